"""On a real device: the memory model's error, caps, a model that promises too much, a neighbour."""

import numpy as np
import pytest
from gpu_memory import UNBOUND_TOKENS, Capped, Measured, embed_capped, measure_errors, visit_card
from random_encoder import GIB, STORY, RandomEncoder, run_apart

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

MAX_BATCH_TOKENS = 32_768


def capped(device: str, total_bytes: int, gib: float) -> RandomEncoder:
    return RandomEncoder(device, fraction=min(1.0, gib * GIB / total_bytes))


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_calibrated_model_is_right_on_shapes_it_has_not_seen(device: str, precision: str) -> None:
    one: Measured = run_apart(measure_errors, RandomEncoder(device, precision=precision), 16, 20.0, tiny=False)
    peaks = np.array([x.peak_bytes for x in one.samples])
    fitted, prior = np.array(one.fitted) / peaks - 1, np.array(one.prior) / peaks - 1
    print(f"{precision} fitted {fitted.round(3).tolist()} closed form {prior.round(3).tolist()}")
    assert len(peaks) == 16
    assert np.median(np.abs(fitted)) <= 0.05
    assert fitted.min() >= -0.03
    assert np.median(np.abs(prior)) <= 0.25


@pytest.mark.parametrize("gib", [15, 8, 4])
def test_nothing_runs_out_of_memory_after_the_calibration(device: str, total_bytes: int, gib: float) -> None:
    spec = capped(device, total_bytes, gib)
    lengths = [*spec.draw_lengths(800), *STORY]
    result: Capped = run_apart(embed_capped, spec, lengths, MAX_BATCH_TOKENS, 1.0, tiny=False)
    assert [step for step in result.embedded.steps if step.kind == "oom"] == []
    assert result.embedded.failed == {}
    assert sum(result.embedded.batch_sizes) == len(lengths)
    assert (result.embedded.peak_bytes or 0) <= result.budget_bytes


def test_a_model_that_promises_too_much_meets_real_out_of_memory_and_loses_nothing(
    device: str, total_bytes: int
) -> None:
    spec = capped(device, total_bytes, 4)
    lengths = [512] * 1200
    calm: Capped = run_apart(embed_capped, spec, lengths, MAX_BATCH_TOKENS, 1.0, tiny=False)
    wrong: Capped = run_apart(embed_capped, spec, lengths, UNBOUND_TOKENS, 0.3, tiny=False)
    assert "oom" in [step.kind for step in wrong.embedded.steps]
    assert wrong.embedded.failed == {}
    assert sum(wrong.embedded.batch_sizes) == len(lengths)  # each node once
    cosine = np.einsum("nd,nd->n", calm.embedded.vectors, wrong.embedded.vectors)
    assert cosine.min() > 0.999
    # Random weights put all texts close to each other (cosine 0.97): only the nearest row shows that none is mixed up.
    nearest = (wrong.embedded.vectors @ calm.embedded.vectors.T).argmax(axis=1)
    assert (nearest == np.arange(len(lengths))).all()


def test_a_neighbour_is_noticed_before_it_costs_an_out_of_memory(device: str, total_bytes: int) -> None:
    if total_bytes < 20 * GIB:
        pytest.skip(f"a card of 15 GiB is made of a larger one; this one has {total_bytes / GIB:.0f} GiB")
    visit = visit_card(RandomEncoder(device), [2000] * 3000, release=True)
    assert visit.got
    kinds = [step.kind for step in visit.embedded.steps]
    assert "oom" not in kinds
    assert "shrink" in kinds
    assert visit.embedded.failed == {}
    before, stay = visit.batches[: visit.taken_at], visit.batches[visit.taken_at : visit.given_back_at]
    assert max(stay) < min(before)
    assert max(visit.batches[visit.given_back_at :]) > max(stay)
