"""The towers of two_tower as a part of another model: the same weights under the same names, and its vectors."""

from collections.abc import Mapping

from torch import Tensor

from raycascade.models.two_tower import TwoTower


class Towers(TwoTower):
    """A two_tower whose item vectors and biases are encoded apart, so that they can be kept."""

    def of_items(self, item: Mapping[str, Tensor], fields_ND: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`vector` [*leading, D] from the item fields' vectors, and `bias` [*leading, T] where items have one."""
        encoded = {"vector": self._normalised(self.item_tower(fields_ND, mask))}
        return encoded if self.item_bias is None else encoded | {"bias": self.item_bias(item["item_id"])}

    def primary(self, users_QTD: Tensor, encoded: Mapping[str, Tensor]) -> Tensor:
        """Logits [Q, C, T], those of two_tower to the bit."""
        logits_QCT = self.scale * (encoded["vector"] @ users_QTD.transpose(1, 2)) + self.bias
        return logits_QCT if self.item_bias is None else logits_QCT + encoded["bias"]
