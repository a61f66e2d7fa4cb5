"""Fields one below the other, all equally wide: the input of models that compare, weigh or multiply fields."""

from typing import Literal

from torch import Tensor

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._deep import DeepOptions
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.schema import FeatureSpace


class StackOptions(InputOptions):
    """Options of models that need every field as a vector of width `dim`; a number is x v + c."""

    dense: Literal["field"] = "field"  # pyright: ignore[reportIncompatibleVariableOverride]


class DeepStackOptions(DeepOptions):
    """The same for models with an MLP over what they make of the fields."""

    dense: Literal["field"] = "field"  # pyright: ignore[reportIncompatibleVariableOverride]


def count_fields(space: FeatureSpace) -> tuple[int, int]:
    """(m_u, m_c): fields of the request, one for each column of the history among them, and of a candidate."""
    columns = [f for f in space.of("item") if f.name in space.history_fields]
    return len(space.of("request", "event")) + len(columns), len(space.of("item", "pair"))


class FieldStacks(FieldInputs):
    """`FieldInputs` as stacks. The order of fields: the request's, the means of the history's columns, the candidate's.

    ConfigError where there are fewer than `least` fields, or none of the candidate.
    """

    def __init__(
        self, options: InputOptions, space: FeatureSpace, *, model: str, least: int = 1, dense_std: float | None = None
    ) -> None:
        super().__init__(options, space, model=model, dense_std=dense_std)
        self.num_request, self.num_candidate = count_fields(space)
        if self.num_fields < least:
            raise ConfigError(f"{model}: it multiplies pairs of fields and the stage sees {self.num_fields} field "
                              "alone; exclude fewer features or use mlp")

    @property
    def num_fields(self) -> int:
        """m = m_u + m_c."""
        return self.num_request + self.num_candidate

    def of_request(self, batch: Batch) -> Tensor:
        """The request's fields [Q, m_u, k]."""
        flat_QD = self.request_matrix(batch, history=True)
        return flat_QD.view(len(flat_QD), self.num_request, self.dim)

    def of_candidates(self, batch: Batch) -> Tensor:
        """The candidates' fields [Q, C, m_c, k]."""
        return self.candidate_matrix(batch).view(*batch.mask_QC.shape, self.num_candidate, self.dim)
