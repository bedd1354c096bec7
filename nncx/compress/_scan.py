"""What a network loses when one layer after the other is pruned alone."""

from dataclasses import asdict, dataclass
from typing import Any

from nncx._table import text_table


@dataclass(frozen=True)
class ScanRow:
    """What pruning one layer does to the network.

    Attributes:
        name: path of the layer; of several that are only pruned together, their paths.
        type: its class.
        parts: how many it has of what is pruned.
        metrics: what the user's function gives for the network, for each amount of the scan.
    """

    name: str
    type: str
    parts: int
    metrics: tuple[float, ...]


@dataclass(frozen=True)
class Scan:
    """How much each layer suffers from pruning; `str` is a table.

    Attributes:
        unit: what is pruned, as "filters".
        amounts: which fractions of them.
        rows: in order of execution.
        metric: of the network as it is.
    """

    unit: str
    amounts: tuple[float, ...]
    rows: tuple[ScanRow, ...]
    metric: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, fit for `json.dumps`."""
        rows = [asdict(row) | {"metrics": list(row.metrics)} for row in self.rows]
        return asdict(self) | {"amounts": list(self.amounts), "rows": rows}

    def __str__(self) -> str:
        header = ["layer", "type", self.unit, *(f"-{amount:.0%}" for amount in self.amounts)]
        lines = [
            [row.name, row.type, f"{row.parts:,}", *(f"{each:.4g}" for each in row.metrics)]
            for row in self.rows
        ]
        table = text_table([header, *lines], texts=2)
        return f"{table}\n\nmetric of the whole network: {self.metric:.4g}"
