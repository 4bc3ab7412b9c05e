"""A model on a test set: restorations, maps, scores, thresholds, and the results of a run.

    python evaluate.py runs/mvtec/cable --infer-steps 5      score a run's model again

It restores the images, turns their maps into scores (Eq. 10, 11) and these into metrics.
"""
import argparse
import dataclasses
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import metrics
from data import (Images, RunData, Textures, load_run_data, name_in, save_data_record, scale,
                  scoring_side, unscale)
from metrics import CalibrationScores, threshold
from perlin import anomaly_appearance, anomaly_mask, random_perlin
from runs import Run, load_model, result_path, saved_settings
from settings import Settings, check, fields_of, with_all_steps
from support import ranks
from support.console import InputError, exit_status, progress_bar
from support.devices import hardware, median_seconds, pick_device
from support.files import (float_array, locked_folder, save_atomically, save_csv_if_possible,
                           save_json)
from support.flags import add_flags
from support.layouts import clean_data
from support.pictures import draw_rows, pick_rows
from support.report import print_odd_photos, print_table, print_threshold_check
from transfusion import Method, Restoration, anomaly_score, final_mask, forward_process


# ---------------------------------------------------------------- restorations and maps

def network_calls(model: Method, s: Settings) -> int:
    """How many network calls a restoration makes. Raises InputError if the schedule has fewer."""
    try:
        return len(model.path(s.infer_steps)) - 1
    except ValueError as error:
        raise InputError(f"--infer-steps {s.infer_steps}: {error}")


def restore_all(model: Method, images: Images, indices, s: Settings):
    """Restore images[indices] batch by batch: yields each batch's slice and its Restoration."""
    device = next(model.parameters()).device
    model.eval()
    with progress_bar(total=len(indices), desc="restoring", unit="image", leave=False) as bar:
        for start in range(0, len(indices), s.eval_batch):
            chosen = indices[start:start + s.eval_batch]
            x = scale(images[chosen].to(device))
            yield slice(start, start + len(chosen)), model.restore(x, s.infer_steps)
            bar.update(len(chosen))


def raw_maps(model: Method, images: Images, indices, s: Settings) -> dict[str, np.ndarray]:
    """Unfiltered M_disc, M_recon and last M of images[indices], float32 [N, H, W], by name."""
    maps = {name: float_array((len(indices), s.crop, s.crop), s.memory_gb)
            for name in Restoration._fields[1:]}
    for batch, restored in restore_all(model, images, indices, s):
        for name in maps:
            maps[name][batch] = getattr(restored, name)[:, 0].cpu().numpy()
    return maps


def final_maps(maps: dict[str, np.ndarray], s: Settings, side: int = 0) -> np.ndarray:
    """M_final [N, H, W] of Eq. 10, or one of its parts alone (Table 4), from raw maps.

    side: bring the maps bilinearly to side x side; 0 leaves them at the model's size.
    """
    lam = {"combined": s.lam, "disc": 1.0, "recon": 0.0, "last": 1.0}[s.final_mask]
    mask = "M_last" if s.final_mask == "last" else "M_disc"
    N, H, W = maps[mask].shape
    final = float_array((N, side or H, side or W), s.memory_gb)
    for start in range(0, N, 64):
        batch = slice(start, start + 64)
        M_disc, M_recon = (torch.tensor(maps[name][batch])[:, None]
                           for name in (mask, "M_recon"))
        M_final = final_mask(M_disc, M_recon, lam, s.kernel)
        if side:
            M_final = F.interpolate(M_final, (side, side), mode="bilinear")
        final[batch] = M_final[:, 0].numpy()
    return final


def score_maps(maps: dict[str, np.ndarray], labels: np.ndarray, masks: np.ndarray | None,
               s: Settings) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of raw maps, and the image scores [N]. Pixels are compared on the scoring grid."""
    scores = image_scores(final_maps(maps, s))
    return metrics.evaluate(labels, scores, final_maps(maps, s, scoring_side(s)), masks), scores


def image_scores(M_final: np.ndarray) -> np.ndarray:
    """Eq. 11 of maps [N, H, W]: [N]. Raises InputError for a score that is no number, as that
    would pass for a normal image's."""
    scores = anomaly_score(torch.from_numpy(M_final)).numpy()
    if not np.isfinite(scores).all():
        raise InputError("a score is no number: the model's weights are damaged")
    return scores


def score(model: Method, s: Settings, run_data: RunData):
    """Restore and score the test set: metrics, image scores [N], raw maps."""
    maps = raw_maps(model, run_data.test, range(len(run_data.test)), s)
    return *score_maps(maps, run_data.category.labels, run_data.masks, s), maps


def run_after_training(model: Method, run_data: RunData) -> None:
    """Show a trained model the training images once more, where its method asks for it. Raises
    InputError where the method lacks something."""
    if not model.IMAGES_AFTER_TRAINING:
        return
    device = next(model.parameters()).device
    indices = run_data.train_indices[:model.IMAGES_AFTER_TRAINING]
    model.eval()
    model.after_training(scale(run_data.images[indices].to(device)))


def seconds_per_image(model: Method, s: Settings, images: Images) -> float:
    """Time to restore one image alone (Table 5): the median of three after one to warm up."""
    x = scale(images[[0]].to(next(model.parameters()).device))
    model.eval()
    return median_seconds(lambda: model.restore(x, s.infer_steps).x_0.cpu())


# ---------------------------------------------------------------- thresholds

TRAINING_SCORES = 1000  # images of the training that are scored for the threshold, at most
SYNTHETIC = 64          # defects painted on held-out images, to see how many a threshold finds
FAINT = 0.25            # their opacity, beta in Eq. 2


def scores_of(model: Method, s: Settings, images: Images | Tensor, indices) -> list[float]:
    """Eq. 11 of images[indices]."""
    return image_scores(final_maps(raw_maps(model, images, indices, s), s)).tolist()


def calibration_scores(model: Method, s: Settings, run_data: RunData) -> CalibrationScores | None:
    """The scores that give a run its threshold; None where no normal image is held out."""
    images, held_out = run_data.images, run_data.held_out
    if not len(held_out):
        return None
    synthetic, _ = synthetic_defects(images, held_out, run_data.foreground, run_data.textures)
    training = run_data.train_indices[:TRAINING_SCORES if model.TRAINS else 0]
    return CalibrationScores(scores_of(model, s, images, held_out),
                             scores_of(model, s, images, training),
                             scores_of(model, s, synthetic, range(len(synthetic))),
                             network_calls(model, s))


def synthetic_defects(images: Images, held_out, foreground: Tensor,
                      textures: Textures) -> tuple[Tensor, Tensor]:
    """Section 3.3's anomalies at opacity FAINT on the images held out, in turn.

    Returns images, uint8 [SYNTHETIC, 3, H, W], and masks M, [SYNTHETIC, 1, H, W] in {0, 1}; always
    the same ones for the same images.
    """
    rng = np.random.default_rng(0)
    chosen = np.resize(held_out, SYNTHETIC)
    n, foreground = images[chosen], foreground[chosen].float()
    M, _ = anomaly_mask(random_perlin(rng, SYNTHETIC, *n.shape[2:], n.device), foreground)
    A = torch.stack([anomaly_appearance(image, texture, rng)
                     for image, texture in zip(n, textures.draw(SYNTHETIC, rng))])
    x = forward_process(n.float(), A.float(), M, FAINT)
    return x.round().to(torch.uint8), M


# ---------------------------------------------------------------- the results of a run

def finish(run: Run) -> dict:
    """Give a trained run its threshold, save it with that, and score it. Returns the metrics.

    Without defective test images a preview shows synthetic defects on held-out images.
    """
    s, run_data, model = run.settings, run.data, run.scored_model
    start = time.perf_counter()
    run_after_training(model, run_data)
    run.seconds += time.perf_counter() - start
    if len(run_data.held_out):
        print("  scoring normal images, for the threshold", flush=True)
    scores = calibration_scores(model, s, run_data)
    limit = scores and threshold(scores, s.false_alarms)
    run.calibration = scores and asdict(scores)
    run.save()
    if scores:
        print(f"  {metrics.describe_threshold(scores, limit)}")
    if run_data.test:
        results = write_results(run, run.folder / "metrics.json")
    else:
        results = {"data": run_data.category.data, "category": s.category, "seed": s.seed,
                   "step": run.step, "epoch": math.ceil(run.step / run.steps_per_epoch),
                   "threshold": scores and limit.value,
                   "synthetic_found": scores and metrics.synthetic_detection_rate(scores, limit)}
        save_json(run.folder / "metrics.json", results)
        print("  no test images: trained, but not scored")
    if scores and not any(item.label for item in run_data.category.test):
        path = run.folder / "preview.png"
        save_atomically(path, lambda file: draw_preview(file, model, s, run_data))
        print(f"  no defective parts to test on; {path} shows synthetic defects on held-out images "
              f"instead, a preview and no result")
    elif scores and not math.isnan(results["image_f1max"]):
        print_threshold_check(results)
    if scores:
        good = np.concatenate([run_data.held_out, run_data.train_indices[:len(scores.training)]])
        print_odd_photos(run.folder / "odd.png", run_data.images, good, metrics.odd_ones(scores),
                         lambda file, *rows: draw_restorations(file, model, s, *rows))
    return results


def write_results(run: Run, path: Path) -> dict:
    """Score a run's model. Returns its metrics, and writes them to `path`. Beside metrics.json,
    scores.csv, maps.npz and qualitative.png are written, too."""
    s, run_data, model = run.settings, run.data, run.scored_model
    items = run_data.category.test
    print(f"  scoring {len(items)} test images", flush=True)
    results, scores, maps = score(model, s, run_data)
    calibration = CalibrationScores(**run.calibration) if run.calibration else None
    labels = run_data.category.labels
    results.update(metrics.threshold_metrics(calibration, s.false_alarms, labels, scores))
    results.update(data=run_data.category.data, category=s.category, method=s.method,
                   preset=s.preset, seed=s.seed, step=run.step,
                   epoch=math.ceil(run.step / run.steps_per_epoch),
                   seconds_train=round(run.seconds, 1),
                   seconds_per_image=seconds_per_image(model, s, run_data.test),
                   infer_steps=network_calls(model, s), precision=s.precision,
                   device=s.device, hardware=hardware(s.device), torch=torch.__version__)
    if path.name != "metrics.json":
        save_json(path, results)
        return results
    save_atomically(run.folder / "maps.npz", lambda file: np.savez_compressed(file, **maps))
    save_json(path, results)
    save_csv_if_possible(
        run.folder / "scores.csv",
        [{"file": name_in(run_data.category, item.path), "label": item.label,
          "score": f"{value:.9g}"} for item, value in zip(items, scores)])
    print("  drawing some of them", flush=True)
    save_atomically(run.folder / "qualitative.png",
                    lambda file: draw_test_images(file, model, s, run_data))
    return results


def score_epoch(run: Run, every: int) -> None:
    """--eval-every: score the test set every N epochs, unless recent steps were outliers."""
    epoch = run.log[-1]["epoch"]
    if not every or epoch % every or run.outliers or ranks.RANK:
        return
    run_after_training(run.scored_model, run.data)
    results, *_ = score(run.scored_model, run.settings, run.data)
    run.scored_model.train()
    run.evaluations.append({"epoch": epoch, "step": run.step, **results})
    save_csv_if_possible(run.folder / "eval.csv", run.evaluations)


def draw_test_images(file, model: Method, s: Settings, run_data: RunData) -> None:
    """qualitative.png: some test images of each kind."""
    items = run_data.category.test
    shown = pick_rows([item.defect for item in items])
    truths = [None if run_data.masks is None else run_data.masks[k] for k in shown]
    draw_restorations(file, model, s, run_data.test[shown],
                      [f"{items[k].defect}\n{items[k].path.stem}" for k in shown], truths)


def draw_preview(file, model: Method, s: Settings, run_data: RunData) -> None:
    """preview.png: held-out normal images, and the faint synthetic defects made on them."""
    count = min(6, len(run_data.held_out))
    defective, M = synthetic_defects(run_data.images, run_data.held_out, run_data.foreground,
                                     run_data.textures)
    images = torch.cat([defective[:count], run_data.images[run_data.held_out[:count]]])
    draw_restorations(file, model, s, images,
                      ["synthetic\ndefect"] * count + ["held-out\nnormal"] * count,
                      [*M[:count, 0].numpy(), *np.zeros_like(M[:count, 0])])


def draw_restorations(file, model: Method, s: Settings, images: Tensor, names: list[str],
                      truths: list) -> None:
    """Restore images, uint8 [N, 3, H, W], and draw a row for each: see `pictures.draw_rows`."""
    parts = (part for _, part in restore_all(model, images, range(len(images)), s))
    x_0, *maps = (torch.cat(part).cpu() for part in zip(*parts))
    M_final = final_maps(dict(zip(Restoration._fields[1:], (M[:, 0].numpy() for M in maps))), s)
    photos, restored = (x.permute(0, 2, 3, 1).numpy() for x in (images, unscale(x_0)))
    draw_rows(file, photos, restored, M_final, names, truths)


# ---------------------------------------------------------------- the command

def evaluate_run(folder: Path, changes: dict, device: str = "auto") -> dict:
    """Score the model of a run folder and write the results. Returns the metrics.

    changes: values of Settings by name, of the groups "scoring" and "machine", and "data" where the
    run's images have moved. With another scoring only metrics-*.json is written. Raises InputError.
    """
    device = pick_device(device)
    model, trained, state = load_model(folder / "last.pt", device)
    s = dataclasses.replace(trained, device=str(device), **with_all_steps(changes))
    check(s)
    network_calls(model, s)
    config = saved_settings(folder) or trained             # of a longer training, perhaps
    calibration = state.get("calibration")
    run_data = load_run_data(s, training=False, folder=folder)
    total_steps = config.steps or config.epochs * run_data.steps_per_epoch(config.batch)
    unfinished = state["step"] > 0 and (state["step"] < total_steps
                                        or not calibration and s.hold_out > 0)
    print("".join(f"  {note}\n" for note in run_data.notes if note.startswith("warning")), end="")
    if not run_data.test:
        raise InputError(f"{run_data.category.root}: no test images to score")
    with locked_folder(folder):
        save_data_record(folder, run_data)                 # imported weights have none yet
        if not calibration and model.TRAINS:
            run_after_training(model, run_data)
        scores = calibration_scores(model, s, run_data)
        run = Run(folder, s, run_data, model, step=state["step"], seconds=state["seconds"],
                  calibration=scores and asdict(scores))
        return write_results(run, result_path(folder, s, trained, state["step"] * unfinished))


def command_line() -> argparse.ArgumentParser:
    """The parser of evaluate.py: a run folder, and the flags of a scoring."""
    parser = argparse.ArgumentParser(description="Score the model of a run folder again.",
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN", help="a run folder, such as runs/mvtec/cable")
    add_flags(parser.add_argument_group("scoring"), fields_of("scoring"), default="the run's")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--data", metavar="DIR", help="where the run's images have moved to")
    add_flags(machine, [f for f in fields_of("machine")
                        if f.name in ("root", "device", "memory_gb", "eval_batch")], "the run's")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    changes = vars(command_line().parse_args(argv))
    folder, device = Path(changes.pop("run")).expanduser(), changes.pop("device", "auto")
    if "data" in changes:
        changes["data"] = clean_data(changes["data"])
    print_table([evaluate_run(folder, changes, device)])
    print(f"\nresults are in {folder}")


if __name__ == "__main__":
    sys.exit(main())
