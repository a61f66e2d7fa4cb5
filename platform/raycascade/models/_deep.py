"""The deep part that interaction models have beside their own: an MLP over the request's and the candidate's input."""

from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.models._first_order import FirstOrder, NoFirstOrder
from raycascade.models._inputs import InputOptions
from raycascade.models._layers import ActivationName, NormName, SplitMLP
from raycascade.models._model import RepresentingModel


class DeepOptions(InputOptions):
    """Options of the deep part; without hidden layers there is none."""

    hidden: tuple[int, ...] = (64, 32)
    activation: ActivationName = "relu"
    norm: NormName = "none"
    dropout: float = Option(default=0.0, ge=0, lt=1)


class DeepPart(nn.Module):
    """MLP([x_u; x_c]) without an output bias, or 0 where `options.hidden` is empty. With `num_tasks` 0 it ends at the
    last hidden units, or has width 0."""

    def __init__(self, options: DeepOptions, request_width: int, candidate_width: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.mlp = SplitMLP(request_width, candidate_width, options.hidden, num_tasks, activation=options.activation,
                            norm=options.norm, dropout=options.dropout, out_bias=False) if options.hidden else None

    def silence(self) -> None:
        """Zeroes the last linear map."""
        if self.mlp is not None:
            self.mlp.silence()

    def of_request(self, x_QD: Tensor) -> Tensor:
        """The request's share of the first layer [Q, H]."""
        return x_QD[:, :0] if self.mlp is None else self.mlp.of_request(x_QD)

    def forward(self, request_QH: Tensor, x_QCD: Tensor, mask_QC: Tensor) -> Tensor:
        """[Q, C, T], given `of_request`."""
        if self.mlp is None:
            return x_QCD.new_zeros(*mask_QC.shape, self.num_tasks)
        return self.mlp(request_QH, x_QCD, mask_QC)


class LinearAndDeep(RepresentingModel):
    """A first-order term beside an MLP over what the model makes of the fields, without an output bias: logits start
    at w_0."""

    linear: FirstOrder | NoFirstOrder
    mlp: SplitMLP

    def first_order(self) -> tuple[nn.Module, ...]:
        """w_0 and the weights of values."""
        return (self.linear,)

    def silence(self) -> None:
        """Logits start at w_0, 0."""
        self.linear.silence()
        self.mlp.silence()
