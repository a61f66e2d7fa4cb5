"""The simulated world: a catalogue, users, and what a user truly thinks of an item at a moment.

Shape letters: Q requests, C candidates, N items, U users of a block, L history, D latent width, E content width,
G categories, A authors, V tags of an item. Nothing here depends on how the world is cut into pieces: the catalogue
has its own random stream, and so has every block of `BLOCK_USERS` users.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from pydantic import Field as Option, model_validator

from raycascade.errors import ConfigError
from raycascade.plugins import PluginConfig

START_MS = 1_704_067_200_000  # Monday 2024-01-01 00:00 UTC
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
OLDEST_DAYS = 60  # how old the oldest item is when the log begins
BLOCK_USERS = 256  # users that share a random stream; part of the definition of the data
MAX_TAGS, NUM_TAGS = 3, 40
NUM_AGE_GROUPS, NUM_GENDERS, NUM_REGIONS = 6, 3, 20
SHOWN, CLICKED, LONG_VIEWED = 1, 2, 3  # actions of history events; 0 pads
ACTION_WEIGHT = np.array([0.0, -0.15, 0.5, 1.0], np.float32)
INTEREST_HALF_LIFE_HOURS = 72.0
FATIGUE = 1.5  # what an item loses when it stands in the user's history
MAX_RANKED = 20  # relevance recflow: 30 - rank of the top level stays above 8, the highest of the tied levels
STREAMS = {"catalogue": 0, "population": 1, "users": 2, "days": 3, "warm_up": 4}


class WorldConfig(PluginConfig):
    """Size and seed of the world.

    `levels` logged levels with `per_level` candidates each; `pool` is what enters the production cascade and `funnel`
    what retrieval, pre-ranking and (five levels only) ranking keep; `new_item_share` of the catalogue is born during
    the log, the same number every day; `drift` is how far a taste turns in a day (radians).

    `relevance`: `levels` ranks every level's candidates; `recflow` grades lists as published comparisons on RecFlow do:
    only the top level is ranked, by the stage that chose it (30 - rank), the levels below are tied (5, 6, 7 and, with
    five levels, 8). `features`: every kind there is, or the kinds that RecFlow has: ids, times and the history.
    """

    seed: int = Option(default=7, ge=0)
    num_items: int = Option(default=2_000, ge=1)
    num_users: int = Option(default=1_500, ge=1)
    num_days: int = Option(default=8, ge=1)
    requests_per_user_day: float = Option(default=1.7, gt=0)
    dim: int = Option(default=8, ge=2)
    content_dim: int = Option(default=16, ge=2)
    num_categories: int = Option(default=20, ge=2)
    items_per_author: int = Option(default=8, ge=1)
    zipf: float = Option(default=1.0, ge=0)
    new_item_share: float = Option(default=0.3, ge=0, lt=1)
    drift: float = Option(default=0.04, ge=0)
    levels: Literal[4, 5] = 4
    per_level: int = Option(default=10, ge=1, le=100)
    pool: int = Option(default=360, ge=3)
    funnel: tuple[int, int, int] = (100, 40, 20)
    shown: int = Option(default=6, ge=1)
    history_len: int = Option(default=50, ge=1, le=500)
    relevance: Literal["levels", "recflow"] = "levels"
    features: Literal["every", "recflow"] = "every"

    @model_validator(mode="after")
    def _possible(self) -> "WorldConfig":
        widths = (self.num_explored, *self.keeps)
        if any(before < after + self.per_level for before, after in pairwise(widths)):
            raise ConfigError(f"dataset: a third of the pool, then the funnel, must each be {self.per_level} "
                              f"(per_level) wider than the next level, got widths {widths}; raise pool or lower funnel")
        if self.num_old_items < self.num_explored:
            raise ConfigError(f"dataset: pool {self.pool} needs {self.num_explored} items before the first day, got "
                              f"{self.num_old_items}; raise num_items or lower pool and funnel")
        if self.shown > min(self.per_level, self.history_len):
            raise ConfigError(f"dataset: shown {self.shown} exceeds per_level {self.per_level} or history_len "
                              f"{self.history_len}; lower it")
        if self.relevance == "recflow" and self.per_level > MAX_RANKED:
            raise ConfigError(f"dataset: relevance recflow ranks at most {MAX_RANKED} candidates above the tied "
                              f"levels, got per_level {self.per_level}; lower it")
        return self

    @property
    def keeps(self) -> tuple[int, ...]:
        """How many candidates each stage of the production cascade keeps; the last keeps the top level."""
        return (*self.funnel[: self.levels - 2], self.per_level)

    @property
    def num_explored(self) -> int:
        """The part of a pool that is uniform and free of duplicates."""
        return self.pool // 3

    @property
    def num_old_items(self) -> int:
        """Items that exist before the first day."""
        return self.num_items - int(self.num_items * self.new_item_share)


def stream(config: WorldConfig, name: str, *place: int) -> Generator:
    """The random stream of one part of the world, independent of all others."""
    return Generator(Philox(SeedSequence([config.seed, STREAMS[name], *place])))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Catalogue:
    """All items in order of birth, so that the items alive at a moment are a prefix.

    `view_ND` is what production's retrieval believes of `latent_ND`, `content_NE` what the log tells of it.
    `by_category_N` orders items by category, then birth; `shelf_key_N` and `shelf_mass_N` are the sorted keys and
    the running popularity in that order.
    """

    birth_ms_N: np.ndarray
    category_N: np.ndarray
    author_N: np.ndarray
    latent_ND: np.ndarray
    view_ND: np.ndarray
    content_NE: np.ndarray
    quality_N: np.ndarray
    popularity_N: np.ndarray  # Zipf weights that sum to 1
    duration_s_N: np.ndarray
    tags_NV: np.ndarray  # -1 where an item has fewer tags
    mass_N: np.ndarray  # running popularity in order of birth
    centroid_GD: np.ndarray
    author_AD: np.ndarray
    mood_GH: np.ndarray  # category x hour of the day
    by_category_N: np.ndarray
    shelf_key_N: np.ndarray
    shelf_mass_N: np.ndarray

    def num_alive(self, time_ms: np.ndarray) -> np.ndarray:
        """How many items were born at or before a moment."""
        return np.searchsorted(self.birth_ms_N, time_ms, side="right")


def shelf_key(category: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Sort key of a category and a moment: category first, then time."""
    return (category.astype(np.int64) << 44) + time_ms


def catalogue(config: WorldConfig) -> Catalogue:
    """The catalogue of a world; the same for every piece, so it is kept."""
    return _catalogue(config.model_dump_json())


@lru_cache(maxsize=2)
def _catalogue(config_json: str) -> Catalogue:
    config = WorldConfig.model_validate_json(config_json)
    rng = stream(config, "catalogue")
    n, width = config.num_items, config.dim
    num_authors = max(1, n // config.items_per_author)
    centroid_GD = _unit(rng.standard_normal((config.num_categories, width)))
    author_home_A = rng.integers(0, config.num_categories, num_authors)
    author_AD = _unit(rng.standard_normal((num_authors, width)))
    author_N = rng.integers(0, num_authors, n)
    off_topic_N = rng.random(n) < 0.2
    category_N = np.where(off_topic_N, rng.integers(0, config.num_categories, n), author_home_A[author_N])
    noise_ND = rng.standard_normal((n, width), np.float32) / np.float32(np.sqrt(width))
    latent_ND = _unit(centroid_GD[category_N] + 0.3 * author_AD[author_N] + 0.7 * noise_ND)
    popularity_N = 1.0 / (1.0 + rng.permutation(n)) ** config.zipf
    popularity_N /= popularity_N.sum()
    fame_N = np.log(popularity_N * n)
    birth_ms_N = _births(config, rng)
    by_category_N = np.lexsort((birth_ms_N, category_N))
    peak_G = rng.uniform(0, 24, config.num_categories)
    return Catalogue(
        birth_ms_N=birth_ms_N,
        category_N=category_N.astype(np.int32),
        author_N=author_N.astype(np.int32),
        latent_ND=latent_ND,
        view_ND=_unit(latent_ND + 0.5 * rng.standard_normal((n, width), np.float32) / np.float32(np.sqrt(width))),
        content_NE=_content(config, rng, latent_ND),
        quality_N=(0.3 * fame_N / max(fame_N.std(), 1e-6) + 0.8 * rng.standard_normal(n)).astype(np.float32),
        popularity_N=popularity_N,
        duration_s_N=np.exp(rng.normal(3.5, 0.8, n)).round(1).clip(1.0, 3600.0),
        tags_NV=_tags(rng, latent_ND),
        mass_N=np.cumsum(popularity_N),
        centroid_GD=centroid_GD,
        author_AD=author_AD,
        mood_GH=np.cos(2 * np.pi * (np.arange(24) - peak_G[:, None]) / 24).astype(np.float32),
        by_category_N=by_category_N,
        shelf_key_N=shelf_key(category_N[by_category_N], birth_ms_N[by_category_N]),
        shelf_mass_N=np.cumsum(popularity_N[by_category_N]),
    )


def _births(config: WorldConfig, rng: Generator) -> np.ndarray:
    """Sorted birth times: the old items spread over the days before the log, an equal number of new ones a day."""
    old, new = config.num_old_items, config.num_items - config.num_old_items
    old_ms = START_MS - rng.integers(1, OLDEST_DAYS * DAY_MS, old)
    old_ms[0] = START_MS - OLDEST_DAYS * DAY_MS  # somebody was there first: no moment has an empty catalogue
    new_ms = START_MS + (np.arange(new) % config.num_days) * DAY_MS + rng.integers(0, DAY_MS, new)
    return np.sort(np.concatenate([old_ms, new_ms]))


def _content(config: WorldConfig, rng: Generator, latent_ND: np.ndarray) -> np.ndarray:
    projection_DE = rng.standard_normal((config.dim, config.content_dim)).astype(np.float32)
    content_NE = latent_ND @ projection_DE
    content_NE += 0.5 * rng.standard_normal(content_NE.shape, np.float32)
    return content_NE


def _tags(rng: Generator, latent_ND: np.ndarray, chunk: int = 65_536) -> np.ndarray:
    """Up to three tags an item, those nearest to its latent vector; chunked, so that memory stays small."""
    tag_TD = _unit(rng.standard_normal((NUM_TAGS, latent_ND.shape[1])))
    tags_NV = np.empty((len(latent_ND), MAX_TAGS), np.int16)
    for start in range(0, len(latent_ND), chunk):
        nearness = latent_ND[start:start + chunk] @ tag_TD.T
        nearness += 0.2 * rng.standard_normal(nearness.shape, np.float32)
        tags_NV[start:start + chunk] = np.argsort(-nearness, axis=1)[:, :MAX_TAGS]
    count_N = rng.integers(0, MAX_TAGS + 1, len(latent_ND))
    return np.where(np.arange(MAX_TAGS) < count_N[:, None], tags_NV, -1).astype(np.int16)


@dataclass(frozen=True)
class Users:
    """A block of users. -1 in `age_group_U` and NaN in `activity_U` stand for what the log does not know."""

    ids_U: np.ndarray
    age_group_U: np.ndarray
    gender_U: np.ndarray
    region_U: np.ndarray
    rate_U: np.ndarray  # requests a day
    activity_U: np.ndarray
    taste_UD: np.ndarray
    turn_UD: np.ndarray  # the direction in which the taste drifts
    loyalty_UD: np.ndarray  # taste for authors

    def taste_on(self, day: "np.ndarray | int", drift: float) -> np.ndarray:
        """The latent taste [U, D] on a day: the first day's, slowly turned."""
        angle = np.asarray(day, np.float32)[..., None] * drift
        return _unit(self.taste_UD * np.cos(angle) + self.turn_UD * np.sin(angle))


def users(config: WorldConfig, block: int) -> Users:
    """Users block * 256 to block * 256 + 255, always all of them, so that the world's size changes nobody."""
    profile = stream(config, "population")
    age_group_GD, gender_GD, region_GD = (
        _unit(profile.standard_normal((size, config.dim))) for size in (NUM_AGE_GROUPS, NUM_GENDERS, NUM_REGIONS)
    )
    rng = stream(config, "users", block)
    shape = (BLOCK_USERS, config.dim)
    age_group_U, region_U = rng.integers(0, NUM_AGE_GROUPS, BLOCK_USERS), rng.integers(0, NUM_REGIONS, BLOCK_USERS)
    gender_U = rng.choice(NUM_GENDERS, BLOCK_USERS, p=[0.48, 0.48, 0.04])
    own_UD = rng.standard_normal(shape) / np.sqrt(config.dim)
    taste_UD = 0.5 * age_group_GD[age_group_U] + 0.5 * gender_GD[gender_U] + 0.3 * region_GD[region_U] + own_UD
    multiplier_U = np.exp(rng.normal(-0.18, 0.6, BLOCK_USERS))  # mean 1
    seen_U = multiplier_U * np.exp(rng.normal(0.0, 0.2, BLOCK_USERS))
    return Users(
        ids_U=block * BLOCK_USERS + np.arange(BLOCK_USERS),
        age_group_U=np.where(rng.random(BLOCK_USERS) < 0.05, -1, age_group_U),
        gender_U=gender_U,
        region_U=region_U,
        rate_U=config.requests_per_user_day * multiplier_U,
        activity_U=np.where(rng.random(BLOCK_USERS) < 0.03, np.nan, seen_U),
        taste_UD=_unit(taste_UD),
        turn_UD=_unit(rng.standard_normal(shape)),
        loyalty_UD=_unit(rng.standard_normal(shape)),
    )


@dataclass(frozen=True)
class Situation:
    """Who asks, when, and what was seen before. Histories are right-aligned: the newest event stands last, -1 pads."""

    taste_QD: np.ndarray
    loyalty_QD: np.ndarray
    time_ms_Q: np.ndarray
    history_QL: np.ndarray
    history_time_ms_QL: np.ndarray
    action_QL: np.ndarray


def taste(situation: Situation, latent_QCD: np.ndarray) -> np.ndarray:
    """How well items lie in the direction of the user's taste, [Q, C], saturating at both ends."""
    width = latent_QCD.shape[-1]
    return 2.0 * np.tanh(np.einsum("qcd,qd->qc", latent_QCD, situation.taste_QD) * np.float32(np.sqrt(width) / 2.0))


def mood(world: Catalogue, situation: Situation, items_QC: np.ndarray) -> np.ndarray:
    """Category x hour of the day, [Q, C]."""
    hour_Q = (situation.time_ms_Q // HOUR_MS) % 24
    return 0.5 * world.mood_GH[world.category_N[items_QC], hour_Q[:, None]]


def merit(world: Catalogue, situation: Situation, items_QC: np.ndarray) -> np.ndarray:
    """Quality of the items, less what they lost with age, [Q, C]."""
    age_days_QC = np.maximum(situation.time_ms_Q[:, None] - world.birth_ms_N[items_QC], 0) / DAY_MS
    return 0.7 * world.quality_N[items_QC] - 0.1 * np.log2(1.0 + age_days_QC).astype(np.float32)


def interest(world: Catalogue, situation: Situation, items_QC: np.ndarray) -> np.ndarray:
    """What the history says of each target, [Q, C]: events similar to the target count more (squared similarity),
    recent ones more than old ones, long views more than clicks; what was only shown counts against it."""
    events_QLD = world.latent_ND[situation.history_QL]  # -1 reads the last item, its weight is 0
    age_hours_QL = (situation.time_ms_Q[:, None] - situation.history_time_ms_QL) / HOUR_MS
    weight_QL = ACTION_WEIGHT[situation.action_QL] * np.exp2(-np.maximum(age_hours_QL, 0) / INTEREST_HALF_LIFE_HOURS)
    similarity_QCL = np.matmul(world.latent_ND[items_QC], events_QLD.transpose(0, 2, 1))
    np.maximum(similarity_QCL, 0, out=similarity_QCL)
    np.square(similarity_QCL, out=similarity_QCL)
    total_QC = np.matmul(similarity_QCL, weight_QL.astype(np.float32)[:, :, None])[:, :, 0]
    return np.sign(total_QC) * np.log1p(np.abs(total_QC))


def utility(world: Catalogue, situation: Situation, items_QC: np.ndarray) -> np.ndarray:
    """The true utility [Q, C]: taste, interest, mood, loyalty to the author and merit, less fatigue for repeats."""
    width = world.latent_ND.shape[1]
    loyalty_QC = np.einsum("qcd,qd->qc", world.author_AD[world.author_N[items_QC]], situation.loyalty_QD)
    loyalty_QC = np.tanh(loyalty_QC * np.float32(np.sqrt(width)))
    seen_QC = (items_QC[:, :, None] == situation.history_QL[:, None, :]).any(-1)
    return (
        taste(situation, world.latent_ND[items_QC])
        + interest(world, situation, items_QC)
        + mood(world, situation, items_QC)
        + 0.7 * loyalty_QC
        + merit(world, situation, items_QC)
        - FATIGUE * seen_QC
    ).astype(np.float32)
