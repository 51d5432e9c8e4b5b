"""``scripts/scaling.py``: its counts against formulas worked out by hand, its simulation at its limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def scaling() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    import scaling

    yield scaling
    sys.path.remove(str(SCRIPTS))


def test_networks_are_counted_as_published(scaling: ModuleType) -> None:
    """DINOv2's ViT-B/14 with 37 x 37 positions has 86.58 M parameters; its head by the widths of its layers."""
    found = scaling.count_network("vitb14", 65_536)
    assert abs(found["backbone"] - 86.58e6) < 0.02e6
    mlp = 768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert found["head"] == mlp + 65_536 * 256 + 65_536


def test_bytes_of_a_ring(scaling: ModuleType) -> None:
    """Two GPUs exchange one half of each tensor twice: 2 x 1/2 x 4 bytes a parameter."""
    assert scaling.bytes_on_the_wire(1000, 2) == {"ddp": 4000, "shard_grad_op": 4000, "full_shard": 5000}
    assert set(scaling.bytes_on_the_wire(1000, 1).values()) == {0}
    assert scaling.centre_bytes(4096) == {"centering": 8 * 4097, "sinkhorn": 8 * (3 * 4096 + 1)}
    assert scaling.state_bytes(10, 4) == {"ddp": 200, "sharded": 50}


def test_simulation_at_its_limits(scaling: ModuleType) -> None:
    def step(gpus: int, way: str = "ddp", batch: int = 8, **cluster: float) -> dict[str, float]:
        return scaling.simulate_step(10**8, 2e12, batch, gpus, way, 4096, scaling.Cluster(**cluster))

    assert step(1)["efficiency"] == 1.0
    assert step(1024, node_gb_s=1e9, latency_us=0, jitter=0)["efficiency"] == pytest.approx(1.0, abs=1e-3)
    slow = step(1024, node_gb_s=0.01, latency_us=0, jitter=0)
    assert slow["exposed_ms"] == pytest.approx(slow["wire_ms"], rel=0.01)  # nothing can hide what takes for ever
    assert slow["wire_ms"] == pytest.approx(2 * 1023 / 1024 * 4e8 / (0.01e9 * 0.8) * 1e3)
    efficiencies = [step(gpus)["efficiency"] for gpus in (8, 16, 64, 256, 1024)]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert step(1024, batch=32)["efficiency"] > step(1024, batch=8)["efficiency"]


def test_the_script_prints_one_document(scaling: ModuleType) -> None:
    words = [sys.executable, str(SCRIPTS / "scaling.py"), "--tiny", "--json"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(answer.stdout)
    # one order of 20,000 int64, or two where passes meet
    assert found["measured"]["sampler"]["order_mb"] in (pytest.approx(0.16), pytest.approx(0.32))
    assert found["measured"]["index"]["cases"] == 20_000
    assert {row["gpus"] for row in found["simulated"]} == {1, 8, 1024}
    assert "efficiency" in scaling.show(found)
