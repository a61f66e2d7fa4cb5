"""From codes to tokens: rows of ONE table per feature (0 padding, 1 unknown), whose embeddings a model adds up.

`unigram` and `bigram` are the n-grams of Singh et al., "Better Generalization with Semantic IDs" (RecSys 2024), with
offsets in one table in place of one table per position; `pieces` are their SentencePiece tokens: frequent sequences of
codes get rows of their own (byte-pair encoding: Sennrich et al., ACL 2016; SentencePiece: Kudo and Richardson, 2018).

Shapes: N items, L levels, K codes of a level. An item without content has -1 for all its codes, and no token.
"""

import hashlib
import io
from typing import Literal

import numpy as np
import pyarrow as pa
import sentencepiece
from pydantic import Field as Option

from raycascade.errors import BundleError, ConfigError
from raycascade.keys import fold
from raycascade.plugins import PluginConfig
from raycascade.ragged import Ragged
from raycascade.schema import FIRST_ROW, PADDING, UNKNOWN

PRIVATE_PLANE = 0xF0000  # the first character of the private-use plane A, whose 65,534 characters mean nothing else
NUM_CHARACTERS = 65_534
MAX_ROWS = (1 << 31) - 1  # rows travel as int32
MISSING = -1  # the codes of an item without content
Kind = Literal["unigram", "bigram", "pieces"]


class Tokenizer:
    """Codes [N, L] to lists of rows. `num_rows`: of the table, with padding and unknown; `max_tokens` of one item."""

    class Config(PluginConfig):
        """`rows`: of the table. `pieces` needs at least L K + 2 of them (default 65,536) and learns from `corpus`
        impressions of the training period at most; `bigram` hashes into them (None: an exact row for every pair);
        `unigram` has 2 + L K whatever is set, so that it must be left out."""

        kind: Kind = "pieces"
        rows: int | None = Option(default=None, ge=3, le=MAX_ROWS)
        corpus: int = Option(default=1_000_000, ge=1)
        seed: int = 7

    kind: Kind

    def __init__(self, levels: int, codes: int) -> None:
        self.levels, self.codes = levels, codes

    @property
    def num_rows(self) -> int:
        """Rows of the table, padding and unknown included."""
        raise AssertionError("every kind knows its rows")

    @property
    def max_tokens(self) -> int:
        """The most tokens that an item has."""
        return self.levels

    def tokens(self, codes_NL: np.ndarray) -> Ragged:
        """The rows (int32) of every item, in order; an item without content has none."""
        assert codes_NL.ndim == 2, codes_NL.shape
        assert codes_NL.shape[1] == self.levels, codes_NL.shape
        known_N = codes_NL[:, 0] != MISSING
        known_NL = codes_NL[known_N].astype(np.int64)
        assert ((known_NL >= 0) & (known_NL < self.codes)).all(), "codes of another model"
        found = self._tokens(known_NL)
        lengths_N = np.zeros(len(codes_NL), np.int64)
        lengths_N[known_N] = found.lengths_Q
        return Ragged(found.values, lengths_N)

    def _tokens(self, codes_NL: np.ndarray) -> Ragged:
        raise AssertionError("every kind has its tokens")

    def facts(self) -> dict[str, object]:
        """What tokenizer.json says."""
        return {"kind": self.kind, "levels": self.levels, "codes": self.codes, "rows": self.num_rows}


class Unigram(Tokenizer):
    """One token per level: row 2 + (l - 1) K + c_l."""

    kind: Kind = "unigram"

    @property
    def num_rows(self) -> int:
        """2 + L K."""
        return FIRST_ROW + self.levels * self.codes

    def _tokens(self, codes_NL: np.ndarray) -> Ragged:
        return _even(FIRST_ROW + np.arange(self.levels) * self.codes + codes_NL)


class Bigram(Tokenizer):
    """One token per pair of levels, pairs p = 1, 2 ... without overlap: row 2 + (p - 1) K^2 + c_{2p-1} K + c_{2p}, or
    with `hashed` rows 2 + fold([p - 1, c_{2p-1}, c_{2p}]) mod (hashed - 2). The last of an odd number of levels is a
    unigram, in a block behind the rows of the pairs."""

    kind: Kind = "bigram"

    def __init__(self, levels: int, codes: int, *, hashed: int | None = None) -> None:
        super().__init__(levels, codes)
        self.hashed = hashed
        if self.num_rows > MAX_ROWS:
            raise ConfigError(f"tokenizer bigram: {self.num_rows} rows for {levels} levels of {codes} codes; "
                              "set rows, to hash the pairs")

    @property
    def _pair_rows(self) -> int:
        return self.hashed or FIRST_ROW + self.levels // 2 * self.codes**2

    @property
    def num_rows(self) -> int:
        """Rows of the pairs, and K more if the number of levels is odd."""
        return self._pair_rows + self.levels % 2 * self.codes

    @property
    def max_tokens(self) -> int:
        """Pairs, and one more if the number of levels is odd."""
        return -(-self.levels // 2)

    def _tokens(self, codes_NL: np.ndarray) -> Ragged:
        pairs = self.levels // 2
        first_NP, second_NP = codes_NL[:, 0:2 * pairs:2], codes_NL[:, 1:2 * pairs:2]
        pair_NP = np.broadcast_to(np.arange(pairs), first_NP.shape)
        if self.hashed:
            hashes_NP = fold([pair_NP, first_NP, second_NP])
            rows_NP = FIRST_ROW + (hashes_NP % np.uint64(self.hashed - FIRST_ROW)).astype(np.int64)
        else:
            rows_NP = FIRST_ROW + pair_NP * self.codes**2 + first_NP * self.codes + second_NP
        last = [self._pair_rows + codes_NL[:, -1:]] if self.levels % 2 else []
        return _even(np.concatenate([rows_NP, *last], axis=1))

    def facts(self) -> dict[str, object]:
        """What tokenizer.json says."""
        return super().facts() | {"hashed": self.hashed}


class Pieces(Tokenizer):
    """SentencePiece tokens of the string that an item's codes are, one character each; every character is a piece of
    its own, so that no codes are unknown. `model`: the bytes of a trained model, whose ids are the rows."""

    kind: Kind = "pieces"

    def __init__(self, levels: int, codes: int, model: bytes) -> None:
        super().__init__(levels, codes)
        self.model = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise BundleError("pieces.model: no SentencePiece model; restore the file or train again") from None

    @classmethod
    def train(cls, levels: int, codes: int, corpus_ML: np.ndarray, *, rows: int, threads: int = 1) -> "Pieces":
        """Learns at most `rows` pieces from the codes of M impressions. ConfigError where the characters are too many,
        or the rows too few for them."""
        characters, least = levels * codes, levels * codes + FIRST_ROW
        if characters > NUM_CHARACTERS:
            raise ConfigError(f"tokenizer pieces: {levels} levels of {codes} codes are {characters} characters, there "
                              f"are {NUM_CHARACTERS}; lower rqvae.codes or use bigram")
        if rows < least:
            raise ConfigError(f"tokenizer pieces: rows {rows} cannot hold the {characters} single codes; "
                              f"set rows to {least} or more")
        assert len(corpus_ML), "no impression to learn from"
        # required_chars makes no piece of a character that the corpus lacks; alone in a line it merges with none.
        unused = np.setdiff1d(np.arange(characters), corpus_ML + np.arange(levels) * codes)
        corpus = [*strings(corpus_ML, codes), *map(character, unused.tolist())]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=rows,
            character_coverage=1.0, required_chars="".join(map(character, range(characters))),
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            split_by_unicode_script=False, split_by_number=False, split_by_whitespace=False,
            max_sentencepiece_length=levels, hard_vocab_limit=False, byte_fallback=False,
            pad_id=PADDING, unk_id=UNKNOWN, bos_id=-1, eos_id=-1, shuffle_input_sentence=False, input_sentence_size=0,
            num_threads=threads, minloglevel=2)
        return cls(levels, codes, model.getvalue())

    @property
    def num_rows(self) -> int:
        """Pieces, padding and unknown included."""
        return self.processor.get_piece_size()

    @property
    def pieces(self) -> list[str]:
        """The text of every row. Two models with the same pieces give the same tokens; their bytes may differ."""
        return [self.processor.id_to_piece(row) for row in range(self.num_rows)]

    def _tokens(self, codes_NL: np.ndarray) -> Ragged:
        if len(codes_NL) == 0:
            return Ragged(pa.array([], pa.int32()), np.zeros(0, np.int64))
        distinct_DL, of_N = np.unique(codes_NL, axis=0, return_inverse=True)
        found = self.processor.encode(strings(distinct_DL, self.codes))
        lists = pa.array(found, pa.list_(pa.int32())).take(pa.array(of_N.reshape(-1)))
        return Ragged.from_arrow(lists)

    def facts(self) -> dict[str, object]:
        """What tokenizer.json says: the pieces by their hash, because the model's bytes also record how it was made."""
        text = "\n".join(self.pieces).encode()
        return super().facts() | {"pieces_sha256": hashlib.sha256(text).hexdigest()}


def train_tokenizer(
    config: Tokenizer.Config, codes_NL: np.ndarray, impressions_N: np.ndarray, *, codes: int, threads: int = 1
) -> Tokenizer:
    """The tokenizer that the config asks for; `pieces` learns from the training period's impressions of the items."""
    levels = codes_NL.shape[1]
    if config.kind == "unigram":
        if config.rows is not None:
            raise ConfigError(f"tokenizer unigram: rows {config.rows} is set, but it has {FIRST_ROW + levels * codes}; "
                              "leave rows out")
        return Unigram(levels, codes)
    if config.kind == "bigram":
        return Bigram(levels, codes, hashed=config.rows)
    corpus_ML = impression_sample(codes_NL, impressions_N, config.corpus, seed=config.seed)
    return Pieces.train(levels, codes, corpus_ML, rows=config.rows or max(65_536, FIRST_ROW + levels * codes),
                        threads=threads)


def impression_sample(codes_NL: np.ndarray, impressions_N: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """The codes of `size` impressions [M, L], evenly spaced from a random start over all impressions in the order of
    the items; all of them where there are fewer. Items without content are left out."""
    counts_N = np.where(codes_NL[:, 0] == MISSING, 0, impressions_N).astype(np.int64)
    total = int(counts_N.sum())
    if total <= size:
        return np.repeat(codes_NL, counts_N, axis=0)
    offset = np.random.default_rng(seed).random()
    places_M = np.floor((np.arange(size) + offset) * (total / size)).astype(np.int64)
    return codes_NL[np.searchsorted(np.cumsum(counts_N), np.minimum(places_M, total - 1), side="right")]


def character(symbol: int) -> str:
    """The character of code c at level l, symbol (l - 1) K + c: the same code at another level is another one."""
    return chr(PRIVATE_PLANE + symbol)


def strings(codes_NL: np.ndarray, codes: int) -> list[str]:
    """Every row as a string of exactly L characters."""
    points_NL = (PRIVATE_PLANE + np.arange(codes_NL.shape[1]) * codes + codes_NL).astype("<u4")
    return [row.tobytes().decode("utf-32-le") for row in points_NL]


def _even(rows_NT: np.ndarray) -> Ragged:
    """Lists of one length."""
    return Ragged(pa.array(rows_NT.reshape(-1).astype(np.int32)), np.full(len(rows_NT), rows_NT.shape[1], np.int64))
