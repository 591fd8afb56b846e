"""Which rows the table has, and what is published of each technique."""

from __future__ import annotations

from dataclasses import dataclass

ENGINE, FLEET, NOT_BUILT = "engine", "fleet", "not built"


@dataclass(frozen=True, slots=True)
class Technique:
    """kind: who measures it. published: what those who propose the technique say that it brings."""

    name: str
    title: str
    kind: str
    published: str


TECHNIQUES = (
    Technique("continuous-batching", "continuous against static batching", ENGINE, "2-5x throughput"),
    Technique("prefix-cache", "prefix cache", ENGINE, "50-80 % less cost on repeated prefixes"),
    Technique("chunked-prefill", "chunked prefill", ENGINE, "steady ITL under long prompts"),
    Technique("speculation", "speculation", ENGINE, "1.5-3x lower latency"),
    Technique("int8", "INT8 weights", ENGINE, "2x less memory than 16 bits"),
    Technique("int4-as-stored", "INT4 weights, the default model's own", ENGINE, "4x less memory, 3-4x less cost"),
    Technique("int4", "INT4 weights, rounded by us", ENGINE, "4x less memory, 3-4x less cost; AWQ loses least"),
    Technique("right-size", "right-size against always the large model", FLEET, "a 3B where a 70B is not needed"),
    Technique("affinity", "prefix affinity against round robin", FLEET, "more cache hits, lower TTFT"),
    Technique("disaggregated-prefill", "disaggregated prefill", NOT_BUILT, "throughput and latency at once"),
    Technique("all-together", "all of the engine's together against none", ENGINE, "-"),
)
BY_NAME = {one.name: one for one in TECHNIQUES}
