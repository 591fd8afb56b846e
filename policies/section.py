"""What every part of the policy document is built from: the frozen section, and the values that several parts share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
)

from policies.budget import MOST_USD


class Section(BaseModel):
    """A mapping of the document. Unknown keys and numbers in quotes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def _fraction(value: Any) -> Any:
    if isinstance(value, str) and value.endswith("%"):
        try:
            return float(value[:-1]) / 100
        except ValueError:
            raise ValueError("must be a number from 0 to 1 or a percentage like 5%") from None
    return value


Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
Share = Annotated[
    float,
    Field(gt=0, le=1),
    BeforeValidator(_fraction),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\d+(\.\d+)?%$"},
            ]
        }
    ),
]
Listed = Field(strict=False)  # of a tuple: YAML has lists; what is in it stays strict
Dollars = Annotated[float, Field(ge=0, le=float(MOST_USD))]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=2**53)]
