"""A small log with every kind of feature, random batches of it, and edits of batches, shared by the tests of models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._model import RepresentingModel
from raycascade.schema import FIRST_ROW, UNKNOWN, FeatureSpace, Field

HISTORY_LEN = 6
SPACE = FeatureSpace(
    fields=(
        Field(name="user_id", side="request", form="id", table="user_id", num_rows=30),
        Field(name="interests", side="request", form="ids", table="tag", num_rows=12, width=2),
        Field(name="age", side="request", form="dense"),
        Field(name="persona", side="request", form="vector", width=4),
        Field(name="hour", side="request", form="id", table="hour", num_rows=26),
        Field(name="item_id", side="item", form="id", table="item_id", num_rows=40),
        Field(name="tags", side="item", form="ids", table="tag", num_rows=12, width=3),
        Field(name="price", side="item", form="dense"),
        Field(name="content", side="item", form="vector", width=5),
        Field(name="type", side="item", form="id", table="type", num_rows=6),
        Field(name="user_id x type", side="pair", form="id", table="user_id x type", num_rows=50),
        Field(name="match.tags", side="pair", form="dense"),
        Field(name="action", side="event", form="id", table="action", num_rows=5, values=("shown", "click", "like")),
        Field(name="gap", side="event", form="dense"),
    ),
    history_len=HISTORY_LEN,
    history_fields=("item_id", "tags"),
    labels=("click", "like"),
)
HISTORY_FIELDS = tuple(SPACE[name] for name in SPACE.history_fields) + SPACE.of("event")
TORCH_MODELS = tuple(n for n in plugins.names("models") if issubclass(plugins.find("models", n), nn.Module))
FITTED_MODELS = tuple(n for n in plugins.names("models") if n not in TORCH_MODELS)  # without parameters, frozen
REPRESENTING = tuple(n for n in TORCH_MODELS if issubclass(plugins.find("models", n), RepresentingModel))

# Options beside the defaults under which a model must keep its promises too.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mlp": [{"dense": "field", "norm": "batch", "activation": "silu"}, {"hidden": [], "norm": "layer"}],
    "din": [
        {"normalise": "softmax", "attention_hidden": [8, 4], "attention_activation": "sigmoid", "dense": "field"},
        {"attention_activation": "dice", "attention_hidden": [6], "activation": "prelu", "products": True},
    ],
    "wide_deep": [{"crosses": ["user_id x type"], "dense": "field", "norm": "batch"}],
    "deepfm": [{"hidden": [], "dim": 3}, {"norm": "layer"}],
    "dcn": [{"hidden": [], "num_layers": 4}, {"num_layers": 1, "dense": "field", "norm": "batch"}],
    "dcn_v2": [
        {"rank": 3, "experts": 2, "structure": "stacked", "activation": "silu", "hidden": [12]},
        {"rank": 4, "num_layers": 3, "hidden": []},
        {"structure": "stacked", "hidden": [], "num_layers": 1, "dense": "field"},
    ],
    "edcn": [
        {"bridge": "concat", "num_layers": 3, "dim": 4},
        {"bridge": "attention", "temperature": 0.5, "dim": 4},
        {"bridge": "add", "num_layers": 1, "gate_scale": "none", "dim": 4},
    ],
    "bst": [{"blocks": 2, "heads": 3, "pool": "mean", "position": "events"},
            {"mask": "full", "blocks": 2}],
    "dien": [{"attention": "mlp", "attention_hidden": [6], "auxiliary": "mlp", "pooled": True, "activation": "prelu"},
             {"alpha": 0.0, "dense": "field"}],
    "shared_bottom": [{"hidden": [16, 8], "activation": "dice", "tower_hidden": []},
                      *({"tower": {"name": name, "dim": 4}} for name in REPRESENTING)],
    "mmoe": [{"hidden": [16, 8], "activation": "prelu", "experts": 2, "tower_hidden": []},
             {"hidden": [16, 8], "norm": "batch", "experts": 2},
             {"tower": {"name": "dcn_v2", "structure": "stacked", "hidden": [], "rank": 3, "dim": 4}}],
    "ple": [{"levels": 2, "hidden": [16, 8], "activation": "dice", "own_experts": 1, "shared_experts": 2,
             "norm": "batch"},
            {"levels": 2, "tower": {"name": "autoint", "hidden": [8], "dim": 4}}],
    "autoint": [{"hidden": [8], "num_layers": 1, "heads": 3, "norm": "batch"}],
    "dlrm": [{"bottom_hidden": [], "hidden": [], "activation": "dice"}, {"norm": "batch", "dim": 3}],
    "afm": [{"l2_attention": 0.1, "attention_dim": 3}],
    "fibinet": [{"bilinear": "all", "excitation": "sigmoid", "dim": 2, "hidden": []},
                {"bilinear": "interaction", "norm": "batch", "hidden": [8]}],
    "deepffm": [{"product": "inner", "hidden": [], "dim": 2}, {"norm": "batch", "activation": "silu"}],
    "fat_deepffm": [{"product": "inner", "hidden": [8], "norm": "batch"}, {"hidden": [], "reduction": 1, "dim": 2}],
    "two_tower": [{"similarity": "dot", "user_history": "attention", "item_bias": True, "activation": "tanh",
                   "item_hidden": []}],
    "hstu": [{"layers": 1, "width": 6, "heads": 3, "silu": "u", "block_out": "concat3", "dense": "field"},
             {"layers": 3, "width": 8, "rab": True}],
    "gesr": [
        {"width": 6, "heads": 3, "layers": 1, "seeds": 0, "gate_rank": 0, "head_hidden": [], "vector_dim": 5},
        {"ro_kv": "history", "mlpg": False, "width": 8, "silu": "u", "block_out": "concat3", "similarity": "dot",
         "item_bias": True, "norm": "layer", "dense": "field"},
        {"hma": False, "self": False, "nro": False, "width": 8, "user_history": "attention"},
        {"self": False, "nro": False, "ro": False, "width": 8, "match_clip": 2, "match_dim": 3, "norm": "batch",
         "pairs": [{"event": "tags", "candidate": "tags", "actions": ["like", "click"]},
                   {"event": "item_id", "candidate": "item_id", "window": 2}]},
    ],
    "int_tower": [{"tap": "input", "hidden": [12, 8], "heads": 3, "norm": "batch"},
                  {"hidden": [8], "heads": 1, "head_dim": 5, "activation": "dice"}],
}
CASES = [(name, options) for name in TORCH_MODELS for options in [{}, *VARIANTS.get(name, [])]]


def case_id(value: object) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"  # type: ignore[union-attr]


def build(
    name: str, options: dict[str, Any], *, space: FeatureSpace = SPACE, num_tasks: int = 1, seed: int = 0,
    generic: bool = True, std: float = 0.3,
) -> Any:
    """A float64 model in evaluation mode over what it accepts of the space; `generic` redraws its parameters."""
    cls, config = plugins.options("models", {"name": name, **options}, "model")
    torch.manual_seed(seed)
    model = cls(config, accepted(name, options, space, num_tasks=num_tasks), num_tasks=num_tasks).double().eval()
    return with_generic_parameters(model, seed=seed, std=std) if generic else model


def accepted(
    name: str, options: dict[str, Any], space: FeatureSpace = SPACE, *, num_tasks: int = 1
) -> FeatureSpace:
    """The space without the features that the model refuses by name."""
    cls, config = plugins.options("models", {"name": name, **options}, "model")
    for _ in space.fields:
        try:
            cls(config, space, num_tasks=num_tasks)
        except ConfigError as error:
            refused = [f.name for f in space.fields if repr(f.name) in str(error)]
            if not refused:
                raise
            space = space.without(tuple(refused))
        else:
            return space
    raise AssertionError(f"{name} refuses every feature")


def with_generic_parameters(model: Any, *, seed: int, std: float = 0.3) -> Any:
    """Every parameter redrawn from N(0, std), and no dropout; the padding rows of tables stay zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight[0] = 0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def values(field: Field, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values of a field; lists of ids have between none and all of their places filled."""
    if field.form == "dense":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if field.form == "vector":
        drawn = torch.randn((*shape, field.width), generator=generator, dtype=torch.float64)
        return nn.functional.normalize(drawn, dim=-1)
    if field.form == "id":
        return torch.randint(UNKNOWN, field.num_rows, shape, generator=generator)
    rows = torch.randint(FIRST_ROW, field.num_rows, (*shape, field.width), generator=generator)
    count = torch.randint(0, field.width + 1, (*shape, 1), generator=generator)
    return torch.where(torch.arange(field.width) < count, rows, 0)


def random_batch(
    *, num_requests: int = 8, num_candidates: int = 5, history_len: int = HISTORY_LEN, seed: int = 0,
    space: FeatureSpace = SPACE,
) -> Batch:
    """Request 0 has an empty history, request 1 a full one, request 2 a single candidate; the rest is random."""
    generator = torch.Generator().manual_seed(seed)
    q, c, length = num_requests, num_candidates, history_len
    events = torch.randint(0, length + 1, (q,), generator=generator)
    counts = torch.randint(min(2, c), c + 1, (q,), generator=generator)
    events[:2] = torch.tensor([0, length])[:q]
    counts[2:3] = 1
    item_fields = tuple(space[name] for name in space.history_fields)
    history_fields = item_fields + space.of("event")
    batch = Batch(
        user={f.name: values(f, (q,), generator) for f in space.of("request")},
        item={f.name: values(f, (q, c), generator) for f in space.of("item", "pair")},
        history={f.name: values(f, (q, length), generator) for f in history_fields},
        history_mask_QL=torch.arange(length) < events[:, None],
        history_rows_QL=torch.randint(FIRST_ROW, 40, (q, length), generator=generator),
        candidates_QC=torch.randint(FIRST_ROW, 40, (q, c), generator=generator),
        mask_QC=torch.arange(c) < counts[:, None],
        time_ms_Q=torch.arange(q) + 1_600_000_000_000,
    )
    return replace(batch, history_negatives={f.name: values(f, (q, length), generator) for f in item_fields})


# ---------------------------------------------------------------- edits
def requests_at(batch: Batch, at: list[int]) -> Batch:
    """Some of the requests, in the given order (a request may come several times)."""
    def take(group: Any) -> dict[str, Tensor]:
        return {name: x[at] for name, x in group.items()}

    return replace(batch, user=take(batch.user), item=take(batch.item), history=take(batch.history),
                   history_negatives=batch.history_negatives and take(batch.history_negatives),
                   history_mask_QL=batch.history_mask_QL[at], history_rows_QL=batch.history_rows_QL[at],
                   candidates_QC=batch.candidates_QC[at], mask_QC=batch.mask_QC[at], time_ms_Q=batch.time_ms_Q[at])


def with_candidates(batch: Batch, edit: Callable[[Tensor], Tensor]) -> Batch:
    """Everything that has one row a candidate, edited alike."""
    return replace(batch, item={name: edit(x) for name, x in batch.item.items()},
                   candidates_QC=edit(batch.candidates_QC), mask_QC=edit(batch.mask_QC))


def with_history(batch: Batch, edit: Callable[[Tensor], Tensor]) -> Batch:
    """Everything that has one row an event, edited alike."""
    negatives = batch.history_negatives
    return replace(batch, history={name: edit(x) for name, x in batch.history.items()},
                   history_negatives=negatives and {name: edit(x) for name, x in negatives.items()},
                   history_mask_QL=edit(batch.history_mask_QL), history_rows_QL=edit(batch.history_rows_QL))


def one_candidate_a_request(batch: Batch) -> Batch:
    """The same pairs as a table of Q * C requests with one candidate each."""
    num_requests, num_candidates = batch.mask_QC.shape
    repeated = requests_at(batch, [q for q in range(num_requests) for _ in range(num_candidates)])
    flat = with_candidates(batch, lambda x: x.flatten(0, 1).unsqueeze(1))
    return replace(repeated, item=flat.item, candidates_QC=flat.candidates_QC, mask_QC=flat.mask_QC)


def joined(left: Tensor, right: Tensor) -> Tensor:
    """Two tensors one behind the other along axis 1."""
    return torch.cat([left, right], 1)


def padded_history(batch: Batch, *, front: bool, num_events: int = 3) -> Batch:
    """Masked events of random content in front of or behind the history."""
    other = random_batch(num_requests=batch.num_requests, history_len=num_events, seed=99)
    other = replace(other, history_mask_QL=torch.zeros_like(other.history_mask_QL))
    first, last = (other, batch) if front else (batch, other)
    negatives = first.history_negatives or {}, last.history_negatives or {}
    return replace(batch, history={n: joined(first.history[n], last.history[n]) for n in batch.history},
                   history_negatives={n: joined(x, negatives[1][n]) for n, x in negatives[0].items()},
                   history_mask_QL=joined(first.history_mask_QL, last.history_mask_QL),
                   history_rows_QL=joined(first.history_rows_QL, last.history_rows_QL))


def padded_candidates(batch: Batch, *, num_candidates: int = 4) -> Batch:
    """Masked candidates of random content behind the others."""
    other = random_batch(num_requests=batch.num_requests, num_candidates=num_candidates, seed=98)
    return replace(batch, item={n: joined(x, other.item[n]) for n, x in batch.item.items()},
                   candidates_QC=joined(batch.candidates_QC, torch.zeros_like(other.candidates_QC)),
                   mask_QC=joined(batch.mask_QC, torch.zeros_like(other.mask_QC)))


def with_other_values(batch: Batch, field: Field, *, seed: int) -> Batch:
    """The batch with one user, context, item or pair field redrawn; the history stays as it is."""
    group = "user" if field.side == "request" else "item"
    old = getattr(batch, group)
    leading = batch.mask_QC.shape if group == "item" else batch.mask_QC.shape[:1]
    new = values(field, tuple(leading), torch.Generator().manual_seed(seed))
    return replace(batch, **{group: {**old, field.name: new}})


def dense_grad(parameter: nn.Parameter) -> Tensor:
    """Its gradient, every row of a table."""
    assert parameter.grad is not None
    return parameter.grad.coalesce().to_dense() if parameter.grad.is_sparse else parameter.grad
