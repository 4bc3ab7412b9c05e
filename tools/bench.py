"""Where the time goes on this machine: training, restoration, scoring, reading.

    python tools/bench.py --preset cpu --json bench.json

The table shows seconds (the median after a warm-up), GFLOP (of convolutions and matrix products),
GFLOP/s, and their share of the GFLOP/s that a large matrix product reaches on this machine at the
same precision.
"""
import argparse
import dataclasses
import importlib.util
import platform
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

import demo
import metrics
import predict
from data import SCORING_GRID, Images, load_mask, load_run_data
from runs import Run, build_model, new_run
from settings import Settings, parse
from support.console import InputError, exit_status
from support.devices import hardware
from support.files import save_csv, save_json
from support.layouts import Category
from support.onnx_file import RUNTIMES
from train import make_batch
from transfusion import Method, TransFusion

SIDE = 4096                                             # of the matrices in the large product
COST = {"crop": (64, 96, 128, 192, 256), "channels": (8, 16, 32, 64), "calls": (1, 2, 5, 10, 20)}


def seconds(function, device: torch.device, repeats: int) -> float:
    """The median time of function() after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def gflop(function) -> float:
    """The GFLOP of function()."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """GFLOP/s of the product of two matrices of SIDE x SIDE."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    return 2 * SIDE ** 3 / 1e9 / seconds(lambda: a @ b, device, repeats)


def peak_gb(s: Settings, training: bool) -> float:
    """Peak memory of a training step, or of the restoration of a batch in two calls, in GB.

    On a GPU it is the GPU's memory, on a CPU the resident memory (Linux only), which includes
    Python and torch themselves. It is measured in a new process, because a process remembers only
    its highest peak.
    """
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(use_memory, (s, training))


def use_memory(s: Settings, training: bool) -> float:
    """What `peak_gb` runs in the new process."""
    device = torch.device(s.device)
    x = torch.zeros(s.batch, 3, s.crop, s.crop, device=device)
    if training:
        run = new_run(Path(), s, None, build_model(s))          # nothing is saved
        M = torch.ones_like(x[:, :1])
        t = torch.full((s.batch,), run.model.last_step, device=device)
        run.model.losses(x, x, M, M, t)["loss"].backward()
        run.optimizer.step()
    else:
        build_model(s).to(device).eval().restore(x, 2)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text()      # ru_maxrss begins with the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def memory_rows(s: Settings) -> list[dict]:
    """Peak memory of training and restoration by batch and by image side."""
    rows = []
    for batch, crop in ((2, s.crop), (4, s.crop), (8, s.crop), (16, s.crop), (8, 64), (8, 256)):
        at = dataclasses.replace(s, batch=batch, crop=crop, resize=crop)
        rows.append({"channels": s.channels, "crop": crop, "batch": batch,
                     "training": peak_gb(at, True), "restoring": peak_gb(at, False),
                     "training, --recompute": peak_gb(dataclasses.replace(at, recompute=True),
                                                      True)})
    return rows


def training_rows(run: Run, repeats: int) -> list[dict]:
    """A training step and its parts."""
    s, model, device = run.settings, run.model, torch.device(run.settings.device)

    def generate():
        return make_batch(s, run.data, model.last_step, 0, device)

    batch = generate()

    def forward(batch=batch):
        return model.losses(*batch)["loss"]

    def forward_and_backward(batch=batch):
        run.optimizer.zero_grad()
        forward(batch).backward()

    def update():
        run.optimizer.step()
        if run.average:
            run.average.update_parameters(model)

    def step():
        forward_and_backward(generate())
        update()

    model.train()
    forward_gflop, both_gflop = gflop(forward), gflop(forward_and_backward)
    forward_seconds = seconds(forward, device, repeats)
    both_seconds = seconds(forward_and_backward, device, repeats)
    step_seconds = seconds(step, device, repeats)
    return [row("anomaly generation", seconds(generate, device, repeats)),
            row("forward and losses", forward_seconds, forward_gflop),
            row("backward", both_seconds - forward_seconds, both_gflop - forward_gflop),
            row("optimiser and average", seconds(update, device, repeats)),
            row(f"training step, batch {s.batch}", step_seconds, both_gflop),
            row("epoch", step_seconds * run.steps_per_epoch)]


def restoration_rows(s: Settings, model: Method, repeats: int) -> list[dict]:
    """A network call by the number of images in a batch; a restoration by its number of calls."""
    device, rows = torch.device(s.device), []
    model.eval()

    def measure(what: str, batch: int, restore) -> dict:
        return row(what, seconds(restore, device, repeats) / batch, gflop(restore) / batch)

    for batch in (1, 4, 16):
        x = torch.zeros(batch, 3, s.crop, s.crop, device=device)
        rows.append(measure(f"a network call an image, batch {batch}", batch,
                            lambda: model.restore(x, 1)))
    for steps in (1, 2, 5, 10, 20):
        rows.append(measure(f"image restored in {steps} calls, batch {s.batch}", s.batch,
                            lambda: model.restore(x[:s.batch], steps)))
    return rows


def cost_rows(s: Settings, repeats: int) -> list[dict]:
    """Seconds an image by image side, channels and network calls, one of them varied at a time.

    In batches of four.
    """
    device, rows = torch.device(s.device), []
    for varied, values in COST.items():
        for value in values:
            case = {"crop": s.crop, "channels": s.channels, "calls": 1, varied: value}
            model = TransFusion(case["channels"], bf16=s.precision == "bf16").to(device).eval()
            x = torch.zeros(4, 3, case["crop"], case["crop"], device=device)
            per_image = seconds(lambda: model.restore(x, case["calls"]), device, repeats) / len(x)
            rows.append({"varied": varied, **case, "seconds_per_image": f"{per_image:.5f}",
                         "precision": s.precision, "hardware": hardware(s.device)})
    return rows


def runtime_rows(run: str, file: str, repeats: int) -> list[dict]:
    """A photo restored and scored by PyTorch, and by the run's ONNX file in each installed runtime.

    They take turns, and the row has the least processor time, so that other programs on the machine
    matter little. PyTorch and OpenVINO compute in bfloat16 where they do so by default.
    """
    first, rows = predict.load(file), []
    calls, side = first.calls, first.s.crop
    models = {"PyTorch": predict.load(run, "cpu", infer_steps=calls)}
    for name in filter(importlib.util.find_spec, RUNTIMES):
        models[name] = predict.load(file, name)
    for batch in (1, 8):
        images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8)
        times = {name: [] for name in models}
        for _ in range(repeats + 1):
            for name, model in models.items():
                start = time.process_time()
                model.restore(images)
                times[name].append((time.process_time() - start) / batch)
        rows += [row(f"photo by {name}, {calls} calls, batch {batch}", min(values[1:]))
                 for name, values in times.items()]
    return rows


def scoring_rows(s: Settings, category: Category, repeats: int) -> list[dict]:
    """The metrics of the test set, of maps that have its size, and the decoding of images."""
    rng = np.random.default_rng(0)
    masks = np.stack([load_mask(item, SCORING_GRID, SCORING_GRID) for item in category.test])
    maps = rng.random(masks.shape, np.float32) + masks
    cpu = torch.device("cpu")
    return [row(f"AUPRO of {len(masks)} maps, {SCORING_GRID} px",
                seconds(lambda: metrics.aupro(maps, masks), cpu, repeats)),
            row(f"all metrics of {len(masks)} maps",
                seconds(lambda: metrics.evaluate(category.labels, maps.max((1, 2)), maps, masks),
                        cpu, 1)),
            row(f"decoding and caching {len(category.train)} images",
                seconds(lambda: Images(category.train, s.resize, s.crop), cpu, 1))]


def row(what: str, seconds: float, gflop: float | None = None) -> dict:
    """A row of the table."""
    return {"what": what, "seconds": seconds, "gflop": gflop,
            "gflop_per_second": gflop / seconds if gflop else None}


def print_table(rows: list[dict], rate: float) -> None:
    """rate: GFLOP/s of the large matrix product."""
    def cell(value, form):
        return "" if value is None else format(value, form)

    print(f"{'':38}{'seconds':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'share':>8}")
    for r in rows:
        share = None if r["gflop_per_second"] is None else 100 * r["gflop_per_second"] / rate
        print(f"{r['what']:38}{r['seconds']:10.4f}{cell(r['gflop'], '9.1f'):>9}"
              f"{cell(r['gflop_per_second'], '9.0f'):>9}{cell(share, '6.0f'):>7}"
              f"{'' if share is None else '%'}")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time training, restoration and scoring.",
        epilog="Any flag of train.py, too: --preset (default cpu), --device, --resize ...")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken "
                        "(default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--cost", type=Path, metavar="FILE",
                        help="also measure how the time of an image grows with its side, the "
                        "channels and the network calls, and write that there as CSV")
    parser.add_argument("--onnx", nargs=2, metavar=("RUN", "FILE"),
                        help="only compare PyTorch with the installed ONNX runtimes, in processor "
                        "seconds: a run, and its file by tools/export.py")
    parser.add_argument("--memory", action="store_true",
                        help="also measure the peak memory by batch and image side")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags, train_flags = command_line().parse_known_args(argv)
    json_path, cost_path = (path and path.expanduser() for path in (flags.json, flags.cost))
    for path in (json_path, cost_path):
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}")
    if flags.onnx:
        print(hardware("cpu"))
        return print_table(runtime_rows(*flags.onnx, flags.repeats), 1)
    s, _ = parse(["--category", "gear", "--preset", "cpu", "--root", "data", *train_flags])
    demo.write(Path(s.root) / "demo", "gear")
    rate = matmul_rate(torch.device(s.device), torch.bfloat16 if s.precision == "bf16" else
                       torch.float32, flags.repeats)
    run = new_run(Path(), s, load_run_data(s), build_model(s))          # nothing is saved
    rows = training_rows(run, flags.repeats)
    rows += restoration_rows(s, run.model, flags.repeats)
    rows += scoring_rows(s, run.data.category, flags.repeats)
    print(f"{s.preset} preset: {s.channels} channels, {s.crop} px, {s.precision}; "
          f"{hardware(s.device)}; matrix product {rate:.0f} GFLOP/s")
    print_table(rows, rate)
    memory = memory_rows(s) if flags.memory else []
    for line in memory:
        print("peak GB: " + ", ".join(f"{k} {round(v, 2)}" for k, v in line.items()))
    if cost_path:
        save_csv(cost_path, cost_rows(s, flags.repeats))
    if json_path:
        save_json(json_path, {
            "settings": dataclasses.asdict(dataclasses.replace(s, root="")),
            "hardware": hardware(s.device), "torch": torch.__version__,
            "python": platform.python_version(), "matmul_gflop_per_second": rate,
            "rows": rows, "memory": memory})


if __name__ == "__main__":
    sys.exit(main())
