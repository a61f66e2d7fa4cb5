"""From codes to rows of one table: rows by hand, bijections, hashes, and pieces that depend on the corpus alone."""

from itertools import product

import numpy as np
import pytest

from raycascade.errors import BundleError, ConfigError
from raycascade.ragged import Ragged
from raycascade.semantic_ids.tokenizers import (
    Bigram,
    Pieces,
    Tokenizer,
    Unigram,
    character,
    impression_sample,
    strings,
    train_tokenizer,
)

CODES = np.array([[0, 0], [0, 1], [1, 1]])  # of the three vectors of the quantiser's worked example
CORPUS = np.array([[0, 0, 1]] * 50 + [[0, 0, 0]] * 30 + [[0, 1, 1]] * 15 + [[1, 1, 0]] * 5)


def _lists(tokens: Ragged) -> list[list[int]]:
    return tokens.to_arrow().to_pylist()


def _named(tokenizer: Pieces) -> list[str]:
    """Pieces as letters (the level) and digits (the code): 'a0b1'."""
    found = []
    for piece in tokenizer.pieces[2:]:
        symbols = [ord(sign) - 0xF0000 for sign in piece]
        found.append("".join("abcdefgh"[s // tokenizer.codes] + str(s % tokenizer.codes) for s in symbols))
    return found


def _skewed(count: int, *, levels: int, codes: int, seed: int) -> np.ndarray:
    """Codes of items of which few are frequent."""
    rng = np.random.default_rng(seed)
    items = rng.integers(0, codes, (200, levels))
    return items[np.minimum(rng.geometric(0.03, count) - 1, 199)]


# ---------------------------------------------------------------- n-grams
def test_unigrams_and_pairs_of_the_worked_example_have_their_rows():
    assert _lists(Unigram(2, 2).tokens(CODES)) == [[2, 4], [2, 5], [3, 5]]
    assert _lists(Bigram(2, 2).tokens(CODES)) == [[2], [3], [5]]


@pytest.mark.parametrize(("tokenizer", "num_rows", "max_tokens"), [
    (Unigram(3, 4), 14, 3), (Bigram(4, 3), 2 + 2 * 9, 2), (Bigram(3, 4), 2 + 16 + 4, 2), (Bigram(1, 5), 7, 1),
    (Unigram(1, 5), 7, 1),
])
def test_exact_rows_are_a_bijection_and_use_the_whole_table(tokenizer: Tokenizer, num_rows: int, max_tokens: int):
    every = np.array(list(product(range(tokenizer.codes), repeat=tokenizer.levels)))
    lists = _lists(tokenizer.tokens(every))
    assert len(set(map(tuple, lists))) == len(every)
    assert {len(tokens) for tokens in lists} == {max_tokens} == {tokenizer.max_tokens}
    assert {row for tokens in lists for row in tokens} == set(range(2, num_rows))
    assert tokenizer.num_rows == num_rows


def test_the_same_pair_at_another_place_has_another_row():
    (tokens,) = _lists(Bigram(4, 3).tokens(np.array([[1, 2, 1, 2]])))
    assert tokens == [2 + 1 * 3 + 2, 2 + 9 + 1 * 3 + 2]


def test_hashed_pairs_have_the_rows_of_the_hash_and_stay_in_the_table():
    assert _lists(Bigram(4, 16, hashed=65_538).tokens(np.array([[5, 9, 5, 9]]))) == [[2 + 15_860, 2 + 3_741]]
    tokenizer = Bigram(5, 32, hashed=50)
    rows = np.array(_lists(tokenizer.tokens(np.random.default_rng(0).integers(0, 32, (2000, 5)))))
    assert set(rows[:, :2].ravel()) == set(range(2, 50))
    assert set(rows[:, 2]) == set(range(50, 82))
    assert tokenizer.num_rows == 82


def test_an_item_without_content_has_no_token():
    codes = np.array([[-1, -1], [0, 1], [-1, -1]])
    for tokenizer in (Unigram(2, 2), Bigram(2, 2), Pieces.train(2, 2, CODES, rows=20)):
        lists = _lists(tokenizer.tokens(codes))
        assert lists[0] == lists[2] == []
        assert lists[1:2] == _lists(tokenizer.tokens(codes[1:2]))
        assert _lists(tokenizer.tokens(codes[:1])) == [[]]
        assert _lists(tokenizer.tokens(codes[:0])) == []


# ---------------------------------------------------------------- pieces
def test_frequent_sequences_of_codes_get_pieces_of_their_own():
    tokenizer = Pieces.train(3, 2, CORPUS, rows=10)
    names = _named(tokenizer)
    assert names[:2] == ["a0b0", "a0b0c1"]
    assert sorted(names[2:]) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    seen = [[names[row - 2] for row in rows] for rows in _lists(tokenizer.tokens(
        np.array([[0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 1]])))]
    assert seen == [["a0b0c1"], ["a0b0", "c0"], ["a0", "b1", "c1"], ["a1", "b0", "c1"]]
    assert tokenizer.tokens(CORPUS).lengths_Q.mean() == pytest.approx(1.70)


def test_rows_are_an_upper_bound_and_must_hold_every_code():
    assert Pieces.train(3, 2, CORPUS, rows=100).num_rows == 19
    with pytest.raises(ConfigError, match="rows 7 cannot hold the 6 single codes; set rows to 8 or more"):
        Pieces.train(3, 2, CORPUS, rows=7)
    with pytest.raises(ConfigError, match="8 levels of 8192 codes are 65536 characters"):
        Pieces.train(8, 8192, np.zeros((1, 8), int), rows=1 << 20)


def test_codes_of_which_the_corpus_has_none_are_known_all_the_same():
    """The corpus uses half of the codes; a piece of every single code, and of some sequences, is there."""
    levels, codes = 4, 32
    corpus = _skewed(3000, levels=levels, codes=codes // 2, seed=1)
    tokenizer = Pieces.train(levels, codes, corpus, rows=400)
    pieces = set(tokenizer.pieces)
    assert {character(symbol) for symbol in range(levels * codes)} <= pieces
    assert any(len(piece) > 1 for piece in tokenizer.pieces[2:])
    assert tokenizer.tokens(corpus).lengths_Q.mean() < levels / 2
    anything = np.random.default_rng(2).integers(0, codes, (10_000, levels))
    tokens = tokenizer.tokens(anything)
    rows = tokens.values.to_numpy()
    assert rows.min() >= 2
    assert rows.max() < tokenizer.num_rows <= 400
    assert 1 <= tokens.lengths_Q.min() <= tokens.lengths_Q.max() <= levels
    one_code = Pieces.train(1, 3, np.zeros((5, 1), int), rows=50)
    assert _lists(one_code.tokens(np.array([[0], [1], [2]]))) != [[1]] * 3
    assert one_code.num_rows == 5


def test_pieces_depend_neither_on_threads_nor_on_the_order_of_the_corpus():
    corpus = _skewed(2000, levels=4, codes=16, seed=3)
    one = Pieces.train(4, 16, corpus, rows=150)
    four = Pieces.train(4, 16, np.random.default_rng(0).permutation(corpus), rows=150, threads=4)
    assert one.pieces == four.pieces
    assert one.facts() == four.facts()
    assert one.facts() != Pieces.train(4, 16, corpus[:200], rows=150).facts()


def test_pieces_of_an_item_put_together_are_its_codes():
    tokenizer = Pieces.train(4, 16, _skewed(2000, levels=4, codes=16, seed=3), rows=150)
    texts = strings(np.random.default_rng(4).integers(0, 16, (300, 4)), 16)
    assert {len(text) for text in texts} == {4}
    assert [tokenizer.processor.decode(rows) for rows in tokenizer.processor.encode(texts)] == texts


def test_a_model_that_is_loaded_again_has_the_same_tokens_and_other_bytes_are_refused():
    tokenizer = Pieces.train(3, 2, CORPUS, rows=10)
    again = Pieces(3, 2, tokenizer.model)
    assert _lists(again.tokens(CORPUS)) == _lists(tokenizer.tokens(CORPUS))
    with pytest.raises(BundleError, match=r"pieces\.model: no SentencePiece model"):
        Pieces(3, 2, b"something else")


# ---------------------------------------------------------------- what a tokenizer is trained from
def test_a_small_log_is_the_corpus_and_a_large_one_is_sampled_in_proportion():
    codes = np.array([[0, 0], [0, 1], [1, 0], [-1, -1]])
    whole = impression_sample(codes, np.array([3, 0, 2, 9]), 100, seed=0)
    assert whole.tolist() == [[0, 0]] * 3 + [[1, 0]] * 2
    part = impression_sample(codes, np.array([30_000, 0, 10_000, 9]), 100, seed=0)
    assert part.tolist() == [[0, 0]] * 75 + [[1, 0]] * 25


def test_items_that_were_not_shown_in_training_do_not_change_the_pieces():
    rng = np.random.default_rng(5)
    codes, shown = rng.integers(0, 8, (60, 3)), rng.integers(1, 30, 60)
    more = np.concatenate([codes, rng.integers(0, 8, (1000, 3))])
    config = Tokenizer.Config(rows=80, corpus=500)
    before = train_tokenizer(config, codes, shown, codes=8)
    after = train_tokenizer(config, more, np.concatenate([shown, np.zeros(1000, int)]), codes=8)
    assert isinstance(before, Pieces)
    assert isinstance(after, Pieces)
    assert before.model == after.model


def test_each_kind_is_made_as_the_config_says():
    made = [train_tokenizer(Tokenizer.Config.model_validate(options), CODES, np.ones(3, int), codes=2)
            for options in ({"kind": "unigram"}, {"kind": "bigram"}, {"kind": "bigram", "rows": 4}, {"kind": "pieces"})]
    assert [tokenizer.num_rows for tokenizer in made] == [6, 6, 4, len(_named(made[3])) + 2]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unigram: rows 9 is set, but it has 6; leave rows out"):
        train_tokenizer(Tokenizer.Config(kind="unigram", rows=9), CODES, np.ones(3, int), codes=2)
    with pytest.raises(ConfigError, match="set rows, to hash the pairs"):
        Bigram(8, 65_536)
