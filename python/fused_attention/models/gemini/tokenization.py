"""WordPiece over bytes, with the special tokens of the multimodal model.

Text is brought to NFC and **lower-cased**, cut into words of at most 32 characters (a space belongs to the word after
it, a digit, a Han character and a `#` stand alone), and each word's UTF-8 bytes are cut greedily into the longest
pieces of the vocabulary (Wu et al., 2016, arXiv:1609.08144); pieces that continue a word carry `##`. Every byte that
UTF-8 can hold is a piece of both kinds, so no text becomes `<unk>`, and `decode(encode(text))` is the lower-cased
text, spaces and newlines included. The pieces are learned by merging the most frequent pairs, which is how
`tokenizers` trains WordPiece.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# In the order of their ids, which is the same in every vocabulary and the one that GeminiConfig starts from: pad is 0.
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "image_token": "<image>",
    "audio_token": "<audio>",
    "image_out_token": "<image_out>",
    "audio_out_token": "<audio_out>",
    "unk_token": "<unk>",
}
_STANDARD = ("pad_token", "bos_token", "eos_token", "unk_token")
_CONTINUES = "##"
_WORD = r" ?\p{Han}|#| ?[\p{L}&&[^\p{Han}]]{1,32}| ?\p{N}| ?[^\s\p{L}\p{N}#]{1,32}|\s{1,32}(?!\S)|\s"
_LONGEST_WORD = 4 * 32 + 1  # bytes: the longest of the words above


class GeminiTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of the multimodal model: `<bos>` in front of a text, nothing behind it, `<pad>` on the left.

    Every special token has its name and its id as attributes: `image_token`, `image_token_id`, `boi_token_id` and so
    on for the keys of `SPECIAL_TOKENS`. Make one with `train_tokenizer`, or load one with `from_pretrained`.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> GeminiTokenizer:
    """A tokenizer with the most frequent pieces of `texts`.

    `vocab_size` counts everything: the special tokens (ids 0 to 11), the bytes in both kinds, the learned pieces; few
    texts may give fewer pieces. The same texts give the same vocabulary. Raises `ValueError` for a `vocab_size` that
    has no room for the bytes.
    """
    fixed = [*SPECIAL_TOKENS.values(), *_alphabet()]
    if vocab_size < len(fixed):
        raise ValueError(
            f"vocab_size must be at least {len(fixed)}, the special tokens and the bytes; got {vocab_size}"
        )
    learner = _pipeline({token: index for index, token in enumerate(fixed)})
    trainer = trainers.WordPieceTrainer(
        # Some of what it learns is dropped below.
        vocab_size=vocab_size + len(fixed),
        show_progress=False,
        # Its ids decide between pairs of one frequency; what it is not given here gets them in the order of a hash.
        special_tokens=fixed,
        continuing_subword_prefix=_CONTINUES,
    )
    learner.train_from_iterator(texts, trainer)
    known = set(fixed)
    by_id = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    learned = [token for token, _ in by_id if token not in known and _is_text(token)]
    vocab = {token: index for index, token in enumerate([*fixed, *learned][:vocab_size])}
    return GeminiTokenizer(
        tokenizer_object=_pipeline(vocab),
        model_specific_special_tokens={n: t for n, t in SPECIAL_TOKENS.items() if n not in _STANDARD},
        clean_up_tokenization_spaces=False,  # a space in front of punctuation is the text's own here
        **{name: SPECIAL_TOKENS[name] for name in _STANDARD},
    )


def _pipeline(vocab: dict[str, int]) -> Tokenizer:
    """Text -> NFC, lower case -> words -> a printable character for each byte -> pieces, and all the way back."""
    model = models.WordPiece(
        vocab, unk_token="<unk>", max_input_chars_per_word=_LONGEST_WORD, continuing_subword_prefix=_CONTINUES
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # No word begins with two of `#`, so what does begin so continues a word.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("^" + _CONTINUES), ""), decoders.ByteLevel()])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, vocab[bos])]
    )
    return tokenizer


def _alphabet() -> list[str]:
    """The bytes of lower-cased UTF-8 as pieces: those that can begin a word, and all of them to continue one."""
    ascii_bytes = [byte for byte in range(128) if not 65 <= byte <= 90]
    leading, following = list(range(0xC2, 0xF5)), list(range(0x80, 0xC0))
    names = _byte_names()
    begins = [names[byte] for byte in ascii_bytes + leading]
    return begins + [_CONTINUES + names[byte] for byte in ascii_bytes + leading + following]


def _byte_names() -> dict[int, str]:
    """byte -> the printable character that `tokenizers` writes it as: itself where printable, else U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _is_text(piece: str) -> bool:
    """Whether the piece's bytes are whole characters, so that one piece too many cannot break a character in two."""
    back = {name: byte for byte, name in _byte_names().items()}
    try:
        bytes(back[name] for name in piece.removeprefix(_CONTINUES)).decode()
    except UnicodeDecodeError:
        return False
    return True
