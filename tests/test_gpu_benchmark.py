"""The benchmark of full-size models on a GPU: the smallest case on the CPU, FLOPs against PyTorch's own count, rows of cases that fail, and the document."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fast import slow_but
from second_device import without_steps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from instep.core.files import write_json
from instep.planning.meta import Unread, exits_from, register, tensors_in
from instep.planning.tally import Tally
from instep.training import rollouts
from instep.training.step import iteration

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def silent(event) -> None:
    pass


@pytest.mark.slow
def test_the_smallest_case_runs_is_written_and_is_not_measured_twice(tmp_path, monkeypatch, capsys):
    """The case has a process of its own, as on a card."""
    import gpu

    def main(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        gpu.main()
        return capsys.readouterr()

    out, ask = tmp_path / "gpu.json", gpu.ask
    monkeypatch.setattr(gpu, "ask", lambda job, *heard: ask(job, *heard) if job["case"] else {"card": None, "software": gpu.software()})
    _, said = main("--smallest", "--warmup", 0, "--repeats", 2, "--out", out)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["outcome"] == "measured" and row["card"] is None and row["utilisation"] is None, said
    assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
    assert 0 < row["flops"]["model"] < row["flops"]["hardware"]
    assert row["peak"]["resident"] > 1e8 and row["peak"]["allocated"] is None
    assert 0 < row["planned"]["flops"]["model"] < row["planned"]["flops"]["hardware"] and row["planned"]["bytes"] > 1e6
    assert "iteration 2 of 2" in said and "0 min left" in said
    before = out.read_text()
    assert "0 cases to measure, 1 measured already" in main("--smallest", "--out", out)[1] and out.read_text() == before
    assert main("--smallest", "--list", "--out", out)[0].strip().endswith("measured on a CPU")


def test_a_process_names_its_card_and_software(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a child gives its own to its answers
    gpu.child({"device": "cpu", "case": None})
    assert json.loads(capsys.readouterr().out)["software"]["torch"] == torch.__version__ == gpu.software()["torch"]


def test_out_of_memory_becomes_a_row_and_the_series_goes_on(tmp_path, monkeypatch):
    """Also where another error, such as that of a reward, stands in front of it."""
    import gpu
    import gpu_cases

    def exhausted(*args):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")
        except torch.OutOfMemoryError as error:
            raise ValueError("the reward raised OutOfMemoryError") from error

    def here(job, heard=silent):
        if job["case"] is None:
            return {"card": "NVIDIA H200", "software": {}}
        monkeypatch.setattr(gpu, "timed", exhausted if job["case"]["micro_batch"] == 4 else lambda *args: ([2.0], [{"model": 989e12, "hardware": 1.2e15}]))
        return gpu.measure(gpu_cases.Case(**job["case"]), CPU, 0, 1, heard)

    monkeypatch.setattr(gpu, "ask", here)
    monkeypatch.setattr(gpu, "card", lambda device: "NVIDIA H200")
    chosen = [replace(gpu_cases.smallest_case(), micro_batch=rows) for rows in (4, 2)]
    rows: list = []
    gpu.series(chosen, "cpu", 0, 1, rows, lambda: write_json(tmp_path / "gpu.json", {"rows": rows}), False)
    lost, kept = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert lost["outcome"] == "out of memory" and lost["phase"] == "building" and lost["peak"]["resident"] > 0
    assert lost["error"] == "ValueError: the reward raised OutOfMemoryError"
    assert kept["outcome"] == "measured" and kept["utilisation"]["model"] == 0.5


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    import gpu
    import gpu_cases

    monkeypatch.setattr(gpu, "timed", lambda *args: [][0])
    row = gpu.measure(gpu_cases.smallest_case(), CPU, 0, 1, silent)
    assert row["outcome"] == "failed" and row["error"].startswith("IndexError")
    assert gpu.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not gpu.out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_process_that_dies_becomes_a_row(tmp_path, monkeypatch):
    import gpu

    script = tmp_path / "dies.py"
    script.write_text('import os\nprint(\'{"phase": "warm-up 1 of 2", "peak": null}\', flush=True)\nos.kill(os.getpid(), 9)\n')
    monkeypatch.setattr(gpu, "__file__", str(script))
    row = gpu.ask({})
    assert row["outcome"] == "failed" and row["phase"] == "warm-up 1 of 2" and "status -9" in row["error"]


# half of all combinations of four options of two values: each three options in all their combinations
HALF = [
    (recipe, roles, checkpointing, micro_batch)
    for i, recipe in enumerate(("dmd2", "dm-align-group"))
    for j, roles in enumerate(("lora", "copies"))
    for k, checkpointing in enumerate((False, True))
    for micro_batch in ((4, 1)[(i + j + k) % 2],)
]


@pytest.mark.parametrize(
    ("recipe", "roles", "checkpointing", "micro_batch"), slow_but([("dmd2", "lora", True, 1), ("dm-align-group", "copies", False, 4)], HALF)
)
def test_flops_are_those_that_are_computed(recipe, roles, checkpointing, micro_batch, monkeypatch):
    """Of the smallest case within 2.5%: gradients that its first layers leave out are a larger share there than at full size."""
    import gpu_cases
    import gpu_family

    monkeypatch.setattr(gpu_family.RandomWan, "decode_rows", lambda self, x: torch.zeros(len(x), 3, 9, 48, 48))
    case = replace(gpu_cases.smallest_case(), recipe=recipe, roles=roles, checkpointing=checkpointing, micro_batch=micro_batch)
    built = gpu_family.build(case, CPU)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        iteration(built.state, built.stage, [built.batch], 0.0)
    flops = built.flops(fused=False)
    assert flops["hardware"] == pytest.approx(counter.get_total_flops(), rel=0.025)
    if checkpointing or micro_batch < case.batch:
        assert flops["model"] < 0.95 * flops["hardware"]
    else:
        assert flops["model"] == flops["hardware"]


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["lora", "copies"])
@pytest.mark.parametrize("recipe", ["dmd2", "dm-align-group"])
def test_the_plan_of_the_smallest_case_is_what_it_takes(recipe, roles, monkeypatch):
    """The most bytes of tensors that are alive in real iterations with every exit, and the mean of their networks' FLOPs."""
    import gpu_cases
    import gpu_family
    from gpu_plan import planned

    case = replace(gpu_cases.smallest_case(), recipe=recipe, roles=roles)
    built = gpu_family.build(case, CPU)
    iteration(built.state, built.stage, [built.batch], 0.0)  # the moments are there
    built.flops()
    peaks, flops = [], []
    for shift in range(len(built.stage.rollout.levels)):
        monkeypatch.setattr(rollouts, "draw_exits", exits_from(shift))
        tally = Tally()
        hooks = register(tally, built.state, built.family)
        for tensor in tensors_in(built.batch):
            tally.assign(tensor, "samples and conditions")
        with tally:
            iteration(built.state, built.stage, [built.batch], 0.0)
        for hook in hooks:
            hook.remove()
        peaks.append(max(total for total, _ in tally.moments.values()))
        flops.append(built.flops())
    estimate = planned(case)
    assert estimate["bytes"] == pytest.approx(max(peaks), rel=0.04)
    for kind in ("model", "hardware"):
        assert estimate["flops"][kind] == pytest.approx(sum(one[kind] for one in flops) / len(flops), rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["lora", "copies"])
@pytest.mark.parametrize("model", ["1.3B", "14B"])
def test_full_size_as_shapes(model, roles, monkeypatch):
    """Two blocks of the true width on the meta device: latents, texts, precision and FLOPs of the cases that need a card."""
    import gpu_cases
    import gpu_family

    config = {**gpu_cases.transformer_config(model), "num_layers": 2}
    monkeypatch.setattr(gpu_family, "transformer_config", lambda name: config)
    built = gpu_family.build(gpu_cases.Case(model, roles=roles, batch=2, critic_updates=1), torch.device("meta"))
    assert built.family.latent_shape == (16, 21, 60, 104) and built.batch.cond.text.shape == (2, 512, 4096)
    assert built.family.dtype == torch.bfloat16 and built.family.vae_dtype == torch.float32
    without_steps(built.state)
    with FlopCounterMode(display=False) as counter:
        iteration(built.state, built.stage, [built.batch], 0.0, Unread())
    assert built.flops(fused=False)["hardware"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_reward_decodes_full_size_media():
    import gpu_cases
    import gpu_family

    family = gpu_family.RandomWan(gpu_family.random_pipeline("1.3B", torch.device("meta")), gpu_cases.Case(recipe="dm-align-group"))
    assert sum(p.numel() for p in family.pretrained.parameters()) == pytest.approx(1.42e9, rel=0.01)
    with torch.no_grad():
        assert family.decode(torch.empty(1, 16, 21, 60, 104, device="meta")).shape == (1, 3, 81, 480, 832)


def test_cases_have_names_of_their_own_and_cards_their_peaks():
    import gpu_cases

    cases = gpu_cases.cases()
    assert len({case.name for case in cases}) == len(cases) == 30
    peaks = {name: gpu_cases.peak_flops(name) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 NVL", "GH200 480GB")}
    assert list(peaks.values()) == [312e12, 989e12, 989e12, None, None] and gpu_cases.peak_flops(None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "2B*"], "no case is named '2B*'"),
        (["--attention", "fast"], "attention: 'fast' is not allowed"),
        (["--repeats", "0"], "0 are not allowed"),
        (["--device", "cuda:99"], "device: cuda:99 is not there"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(gpu, "series", lambda *args: pytest.fail("it was measured"))
    with pytest.raises(SystemExit):
        gpu.main()
    assert message in capsys.readouterr().err


# the document


def row(card: str | None, **changed: object) -> dict[str, object]:
    import gpu_cases

    made = {"name": "a-case", "case": asdict(gpu_cases.Case()), "card": card, "software": {"torch": "2.13.0"}, "date": "2026-01-02", "warmup": 2, "repeats": 3}
    peak = {"allocated": 61_200_000_000, "reserved": 64_000_000_000, "resident": 3_000_000_000}
    figures = {
        "seconds": {"median": 81.25, "low": 80.0, "high": 82.0},
        "flops": {"model": 3.3e16, "hardware": 4e16},
        "utilisation": {"model": 0.41, "hardware": 0.5},
    }
    return {**made, "outcome": "measured", **figures, "peak": peak, "planned": None, **changed}


def test_the_document_without_a_gpu_has_no_figure(tmp_path):
    from results_gpu import lines

    write_json(tmp_path / "cpu.json", {"rows": [row(None)]})
    for result in (tmp_path / "none.json", tmp_path / "cpu.json"):
        text = "\n".join(lines(result))
        assert "No GPU was there: none of the 30 cases was run" in text and "python benchmarks/gpu.py  " in text
        assert "| case |" not in text and "81.2" not in text


def test_the_document_with_a_gpu_has_a_table_for_each_card(tmp_path):
    from results_gpu import lines

    lost = row("NVIDIA H200", name="lost", outcome="out of memory", phase="warm-up 1 of 2", error="OutOfMemoryError: CUDA", seconds=None, utilisation=None)
    wired = row("NVIDIA H200", name="planned", planned={"bytes": 60e9, "flops": {"model": 3e16, "hardware": 4.1e16}})
    lost["planned"] = wired["planned"]
    write_json(tmp_path / "gpu.json", {"rows": [row("NVIDIA H200"), lost, wired, row("Other", utilisation=None), row(None)]})
    text = "\n".join(lines(tmp_path / "gpu.json"))
    assert "No GPU was there" not in text
    assert "### NVIDIA H200" in text and "2026-01-02; torch 2.13.0; 2 iterations before and 3 measured" in text and "2 of 3 cases ran to the end" in text
    assert "| a-case | 81.2 (80.0 to 82.0) | 61.2 | 64.0 | 3.0 | 33.0 | 41% | 50% | - | - |" in text
    assert "| lost | out of memory (warm-up 1 of 2) | 61.2 | 64.0 | 3.0 | - | - | - | 60.0 | 41.0 |" in text
    assert "| planned | 81.2 (80.0 to 82.0) | 61.2 | 64.0 | 3.0 | 33.0 | 41% | 50% | 60.0 (-2.0%) | 41.0 (+2.5%) |" in text
    assert "### Other" in text and "| a-case | 81.2 (80.0 to 82.0) | 61.2 | 64.0 | 3.0 | 33.0 | - | - | - | - |" in text


def test_only_what_is_between_the_markers_is_written(tmp_path, monkeypatch):
    import results_gpu

    document = tmp_path / "gpu.md"
    monkeypatch.setattr(results_gpu, "DOCUMENT", document)
    document.write_text(f"before\n{results_gpu.BEGIN}\nstale figures\n{results_gpu.END}\nafter\n")
    results_gpu.write()
    written = document.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "stale" not in written
    results_gpu.write()
    assert document.read_text() == written
    document.write_text("no markers")
    with pytest.raises(ValueError, match="not both there"):
        results_gpu.write()


def test_the_document_is_the_present_one():
    """Red where the measurement or its section changed: run `make results`."""
    from results_gpu import lines

    assert "\n".join(lines()) in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
