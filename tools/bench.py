"""Where the time goes on this machine: training, restoration, scoring, reading.

    python tools/bench.py --preset cpu --json bench.json

One table: seconds (median after warm-up), GFLOP (of convolutions and matrix products), GFLOP/s, and
their share of what a large matrix product reaches here in the same run and precision.
"""
import argparse
import dataclasses
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

import data
import demo
import metrics
import train
from runs import load_source, save_csv, save_json, steps_per_epoch
from settings import InputError, Settings, exit_status, hardware, parse
from transfusion import TransFusion

SIDE = 4096                                             # of the matrices whose product sets the bar
COST = {"crop": (64, 96, 128, 192, 256), "channels": (8, 16, 32, 64), "calls": (1, 2, 5, 10, 20)}


def seconds(timed, device: torch.device, repeats: int) -> float:
    """Median time of timed() after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        timed()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def gflop(counted) -> float:
    with FlopCounterMode(display=False) as counter:
        counted()
    return counter.get_total_flops() / 1e9


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """GFLOP/s of the product of two matrices of SIDE x SIDE."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    return 2 * SIDE ** 3 / 1e9 / seconds(lambda: a @ b, device, repeats)


def peak_gb(s: Settings, training: bool) -> float:
    """Peak memory of one training step, or of restoring one batch in two calls: of the GPU, or
    resident (on Linux), with what Python and torch themselves take. In a process of its own, as a
    process remembers only its highest peak."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(use_memory, (s, training))


def use_memory(s: Settings, training: bool) -> float:
    device = torch.device(s.device)
    model = train.start_model(s, "")
    x = torch.zeros(s.batch, 3, s.crop, s.crop, device=device)
    if training:
        optimizer = train.make_optimizer(model, s)
        M = torch.ones_like(x[:, :1])
        t = torch.full((s.batch,), model.last_step, device=device)
        model.losses(x, x, M, M, t)["loss"].backward()
        optimizer.step()
    else:
        model.eval().restore(x, 2)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text()      # ru_maxrss begins with the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def memory_rows(s: Settings) -> list[dict]:
    """Peak memory of training and evaluation by batch and by image side."""
    rows = []
    for batch, crop in ((2, s.crop), (4, s.crop), (8, s.crop), (16, s.crop), (8, 64), (8, 256)):
        at = dataclasses.replace(s, batch=batch, crop=crop, resize=crop)
        rows.append({"channels": s.channels, "crop": crop, "batch": batch,
                     "training": peak_gb(at, True), "restoring": peak_gb(at, False),
                     "training, --recompute": peak_gb(dataclasses.replace(at, recompute=True),
                                                      True)})
    return rows


def training_rows(s: Settings, source, model: TransFusion, repeats: int) -> list[dict]:
    """A training step and its parts."""
    device = torch.device(s.device)
    optimizer, average = train.make_optimizer(model, s), train.make_average(model, s)

    def generate():
        return train.make_batch(s, source, model.last_step, 0, device)

    batch = generate()

    def forward(batch=batch):
        return model.losses(*batch)["loss"]

    def both(batch=batch):
        optimizer.zero_grad()
        forward(batch).backward()

    def update():
        optimizer.step()
        if average:
            average.update_parameters(model)

    def whole():
        both(generate())
        update()

    model.train()
    forward_gflop, both_gflop = gflop(forward), gflop(both)
    ahead, through = seconds(forward, device, repeats), seconds(both, device, repeats)
    step = seconds(whole, device, repeats)
    return [row("anomaly generation", seconds(generate, device, repeats)),
            row("forward and losses", ahead, forward_gflop),
            row("backward", through - ahead, both_gflop - forward_gflop),
            row("optimiser and average", seconds(update, device, repeats)),
            row(f"training step, batch {s.batch}", step, both_gflop),
            row("epoch", step * steps_per_epoch(s, source))]


def restoration_rows(s: Settings, model: TransFusion, repeats: int) -> list[dict]:
    """An image's network call by images at a time, its restoration by number of calls."""
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
    """Seconds an image by image side, width and number of calls, one varied at a time, batch 4."""
    device, rows = torch.device(s.device), []
    for varied, values in COST.items():
        for value in values:
            at = {"crop": s.crop, "channels": s.channels, "calls": 1, varied: value}
            model = TransFusion(at["channels"], bf16=s.precision == "bf16").to(device).eval()
            x = torch.zeros(4, 3, at["crop"], at["crop"], device=device)
            taken = seconds(lambda: model.restore(x, at["calls"]), device, repeats) / len(x)
            rows.append({"varied": varied, **at, "seconds_per_image": f"{taken:.5f}",
                         "precision": s.precision, "hardware": hardware(s.device)})
    return rows


def scoring_rows(s: Settings, category: data.Category, repeats: int) -> list[dict]:
    rng = np.random.default_rng(0)
    masks = np.stack([data.load_mask(item, 256, 256) for item in category.test])
    maps = rng.random(masks.shape, np.float32) + masks
    cpu = torch.device("cpu")
    return [row(f"AUPRO of {len(masks)} maps, 256 px",
                seconds(lambda: metrics.aupro(maps, masks), cpu, repeats)),
            row(f"all metrics of {len(masks)} maps",
                seconds(lambda: metrics.evaluate(category.labels, maps.max((1, 2)), maps, masks),
                        cpu, 1)),
            row(f"decoding and caching {len(category.train)} images",
                seconds(lambda: data.Images(category.train, s.resize, s.crop), cpu, 1))]


def row(what: str, seconds: float, gflop: float | None = None) -> dict:
    return {"what": what, "seconds": seconds, "gflop": gflop,
            "gflop_per_second": gflop / seconds if gflop else None}


def print_table(rows: list[dict], rate: float) -> None:
    def cell(value, form):
        return "" if value is None else format(value, form)

    print(f"{'':38}{'seconds':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'share':>8}")
    for r in rows:
        share = None if r["gflop_per_second"] is None else 100 * r["gflop_per_second"] / rate
        print(f"{r['what']:38}{r['seconds']:10.4f}{cell(r['gflop'], '9.1f'):>9}"
              f"{cell(r['gflop_per_second'], '9.0f'):>9}{cell(share, '6.0f'):>7}"
              f"{'' if share is None else '%'}")


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(
        description="Time training, restoration and scoring.",
        epilog="Any flag of train.py, too: --preset (default cpu), --device, --resize ...")
    parser.add_argument("--repeats", type=int, default=5, help="median over so many (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--cost", type=Path, metavar="FILE",
                        help="write how an image's time grows with size, width and calls, as CSV")
    parser.add_argument("--memory", action="store_true", help="peak memory by batch and size, too")
    flags, others = parser.parse_known_args(argv)
    flags.json, flags.cost = (path and path.expanduser() for path in (flags.json, flags.cost))
    for path in (flags.json, flags.cost):
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}")
    s, _ = parse(["--category", "gear", "--preset", "cpu", "--root", "data", *others])
    demo.write(Path(s.root) / "demo", "gear")
    rate = matmul_rate(torch.device(s.device), torch.bfloat16 if s.precision == "bf16" else
                       torch.float32, flags.repeats)
    source, model = load_source(s), train.start_model(s, "")
    rows = training_rows(s, source, model, flags.repeats)
    rows += restoration_rows(s, model, flags.repeats)
    rows += scoring_rows(s, source.category, flags.repeats)
    print(f"{s.preset} preset: {s.channels} channels, {s.crop} px, {s.precision}; "
          f"{hardware(s.device)}; matrix product {rate:.0f} GFLOP/s")
    print_table(rows, rate)
    memory = memory_rows(s) if flags.memory else []
    for r in memory:
        print("peak GB: " + ", ".join(f"{k} {round(v, 2)}" for k, v in r.items()))
    if flags.cost:
        save_csv(flags.cost, cost_rows(s, flags.repeats))
    if flags.json:
        save_json(flags.json, {
            "settings": dataclasses.asdict(dataclasses.replace(s, root="")),
            "hardware": hardware(s.device), "torch": torch.__version__,
            "python": platform.python_version(), "matmul_gflop_per_second": rate,
            "rows": rows, "memory": memory})


if __name__ == "__main__":
    sys.exit(main())
