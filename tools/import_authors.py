"""The authors' released weights as a run folder, at step 0, for evaluate.py, predict.py, train.py.

    python tools/import_authors.py cable_model.pkl runs/mvtec/cable-authors
    python evaluate.py runs/mvtec/cable-authors

The folder's path says what the weights are of: OUT/DATA/CATEGORY-NAME. Flags of train.py change the
settings, which are those of the authors preset.
"""
import argparse
import dataclasses
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

from runs import build_model, new_run, run_folder
from settings import Settings, parse
from support.console import InputError, exit_status
from support.files import locked_folder, save_json
from support.weights import load_torch
from transfusion import TransFusion

# Our name of a head's parameter -> theirs; the trunk's names are the same, behind "model.".
AUTHORS_HEADS = {"anomaly_head.0.": "norm.", "anomaly_head.2.": "final.",
                 "normal_head.": "final_mean.", "mask_head.0.": "final_seg.norm.",
                 "mask_head.2.": "final_seg.conv."}


def authors_name(name: str) -> str:
    """Name of a ResUNet parameter in a state dict of the authors' format."""
    for ours, theirs in AUTHORS_HEADS.items():
        if name.startswith(ours):
            return "model." + theirs + name[len(ours):]
    return "model." + name


def load_authors_weights(model: TransFusion, state: dict[str, Tensor]) -> None:
    """Copy a state dict in the authors' format into `model`, which the authors' settings built.

    Raises ValueError that names every key missing, left over, of another shape or with values that
    are not finite; the model is not touched then.
    """
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("the weights are no state dict, names with a tensor each")
    ours = model.net.state_dict()
    theirs = {k: v for k, v in state.items() if not k.endswith("inv_freq")}    # a constant
    names = {name: authors_name(name) for name in ours}
    missing = sorted(set(names.values()) - set(theirs))
    extra = sorted(set(theirs) - set(names.values()))
    shapes = [f"{k} is {list(theirs[k].shape)}, not {list(ours[name].shape)}"
              for name, k in names.items() if k in theirs and theirs[k].shape != ours[name].shape]
    broken = [k for k, value in theirs.items() if not value.isfinite().all()]
    problems = [f"{title}: {', '.join(keys)}" for title, keys in
                (("missing", missing), ("not known", extra), ("of another shape", shapes),
                 ("not finite", broken)) if keys]
    if problems:
        raise ValueError("the weights do not fit the network; " + "; ".join(problems))
    model.net.load_state_dict({name: theirs[k] for name, k in names.items()})


def settings_of(folder: Path, flags: list[str]) -> Settings:
    """The settings of a run OUT/DATA/CATEGORY-NAME with the authors' weights. Raises InputError."""
    category, dash, name = folder.name.rpartition("-")
    if not dash or not category:
        raise InputError(f"{folder}: call it OUT/DATA/CATEGORY-NAME, as runs/mvtec/cable-authors")
    s, _ = parse(["--data", folder.parent.name, "--category", category, "--name", name, "--out",
                  str(folder.parents[1]), "--preset", "authors", *flags])
    if run_folder(s).resolve() != folder.resolve():
        raise InputError(f"{folder}: these flags are of a run in {run_folder(s)}; give that folder")
    return s


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a run folder of the authors' weights.",
                                     epilog="Any flag of train.py, too: --data, --channels ...")
    parser.add_argument("weights", metavar="FILE", help="a state dict in the authors' format")
    parser.add_argument("run", metavar="RUN", help="the run folder to make, OUT/DATA/CATEGORY-NAME")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags, train_flags = command_line().parse_known_args(argv)
    folder = Path(flags.run).expanduser()
    if (folder / "last.pt").exists():
        raise InputError(f"{folder} holds a model already; choose another name")
    s = settings_of(folder, train_flags)
    model = build_model(s)
    if not isinstance(model, TransFusion):
        raise InputError(f"--method {s.method}: the authors' weights are TransFusion's")
    weights = load_torch(Path(flags.weights).expanduser())
    try:
        load_authors_weights(model, weights)
    except ValueError as error:
        raise InputError(f"{flags.weights}: {error}")
    with locked_folder(folder):
        save_json(folder / "config.json", dataclasses.asdict(s))
        new_run(folder, s, None, model).save()
    print(f"{folder} holds the weights; python evaluate.py {folder} scores them")


if __name__ == "__main__":
    sys.exit(main())
