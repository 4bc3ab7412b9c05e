"""Train a model of anomalib on a category, and write its raw maps and scores of the test images.

    python tools/anomalib_maps.py --model Patchcore --data mvtec --category bottle --out maps/patchcore
    python tools/anomalib_maps.py --model Patchcore --run runs/mvtec/bottle --out maps/patchcore
    python tools/score_maps.py maps/patchcore --run runs/mvtec/bottle

Only the model is anomalib's: the images, their decoding and the split are this repository's. The
maps and scores are what the model returns, before anomalib's normalisation and threshold. Needs
`pip install "anomalib==2.7.*"`, which is not in requirements.txt.
"""
import argparse
import ast
import contextlib
import difflib
import inspect
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

from data import SCORING_GRID, name_in
from score_maps import find_run_category, write_maps
from support.console import InputError, exit_status, progress_bar
from support.devices import hardware, pick_device
from support.files import float_array, read_json
from support.images import open_image, to_rgb
from support.layouts import Category, clean_data, find_category, root_folder

INSTALL = 'anomalib is not installed: pip install "anomalib==2.7.*" (0.5 GB beside PyTorch)'
# Length and batch of a training, with the source of each: the authors' repository, or anomalib's
# configuration files. anomalib 2.7 sets neither for these models. In brackets: where anomalib's
# configuration differs from the authors.
LENGTHS = {
    "ReverseDistillation": {"epochs": 200, "batch": 16},     # hq-deng/RD4AD, main.py (batch 32)
    "EfficientAd": {"steps": 70000, "batch": 1},             # anomalib's efficient_ad.yaml
    "Supersimplenet": {"epochs": 300, "batch": 32},          # blaz-r/SuperSimpleNet, train.py
    "Dsr": {"epochs": 150, "batch": 8},                      # VitjanZ/DSR_anomaly_detection: 100,
                                                             # and 50 of its upsampling (700)
    "Draem": {"epochs": 700, "batch": 8},                    # VitjanZ/DRAEM, README.md
    "Stfpm": {"epochs": 100, "batch": 32},                   # gdwang08/STFPM, main.py
    "Fastflow": {"epochs": 500, "batch": 32}}                # anomalib's config.yaml before 1.0
BATCH = 32                                              # of a model that is not listed
CACHE = 4e9                                             # bytes of images that are kept in memory


# ---------------------------------------------------------------- the model

def import_anomalib():
    """The package anomalib. Raises InputError where it is not installed."""
    try:
        with silence():
            import anomalib.models
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "anomalib":
            raise InputError(f"anomalib cannot be imported ({error}); pip install "
                             f"\"anomalib==2.7.*\"")
        raise InputError(INSTALL)
    if not anomalib.__version__.startswith("2.7."):
        warnings.warn(f"anomalib {anomalib.__version__}: only 2.7 was tried here")
    return anomalib


def build_model(name: str, size: int, pre_trained: bool | None, options: dict):
    """A model of anomalib with a pre-processor for size x size pixels, without post-processing.

    pre_trained: None leaves anomalib's default. Raises InputError for a name or an option that
    anomalib does not have, and for weights that cannot be fetched.
    """
    anomalib = import_anomalib()
    from anomalib.models.components import AnomalibModule
    models = {key: value for key, value in vars(anomalib.models).items()
              if inspect.isclass(value) and issubclass(value, AnomalibModule)}
    if name not in models:
        similar = difflib.get_close_matches(name, models, 1)
        raise InputError(f"--model {name}: not an image model of anomalib; "
                         + (f"did you mean {similar[0]}?" if similar else ", ".join(models)))
    parameters = inspect.signature(models[name].__init__).parameters
    if pre_trained is not None:
        if "pre_trained" not in parameters:
            raise InputError(f"--{'' if pre_trained else 'no-'}pre-trained: {name} has no such "
                             f"choice in anomalib")
        options = {**options, "pre_trained": pre_trained}
    unknown = set(options) - set(parameters)
    if unknown:
        raise InputError(f"--set {', '.join(sorted(unknown))}: {name} has "
                         f"{', '.join(set(parameters) - {'self'})}")
    with fetching(name), silence():
        pre_processor = models[name].configure_pre_processor(image_size=(size, size))
        return models[name](pre_processor=pre_processor, post_processor=False, evaluator=False,
                            visualizer=False, **options)


@contextlib.contextmanager
def fetching(name: str):
    """Where anomalib may need files from the network: a failure becomes an InputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: {type(error).__name__}: {text}; if its weights or data could "
                         f"not be fetched, --no-pre-trained (where the model has that choice) "
                         f"trains without them")


@contextlib.contextmanager
def silence():
    """Without the advice and the warnings of anomalib, Lightning and their dependencies."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def map_side(transform) -> int:
    """How many of the 256 pixels of the image's side a model sees, around the centre."""
    from anomalib.data.transforms.utils import extract_transforms_by_type
    from torchvision.transforms.v2 import CenterCrop, Resize
    crops = extract_transforms_by_type(transform, CenterCrop)
    if not crops:
        return SCORING_GRID
    resized = extract_transforms_by_type(transform, Resize)[0].size
    return round(SCORING_GRID * crops[0].size[0] / resized[0])


# ---------------------------------------------------------------- the images

class Photos(torch.utils.data.Dataset):
    """Images as anomalib's models take them: items of float32 [3, H, W] in 0..1, resized."""

    def __init__(self, paths: list[Path], resize):
        self.paths, self.resize, self.cache, self.bytes = paths, resize, {}, 0

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, k: int) -> torch.Tensor:
        """Image k, decoded as everywhere in this repository: upright, 8-bit RGB."""
        if k in self.cache:
            return self.cache[k]
        pixels = np.array(to_rgb(open_image(self.paths[k])))
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        image = self.resize(image) if self.resize else image
        if self.bytes + image.nbytes <= CACHE:
            self.cache[k], self.bytes = image, self.bytes + image.nbytes
        return image

    def __getitem__(self, k: int):
        from anomalib.data import ImageItem
        from torchvision.tv_tensors import Image, Mask
        image = self.image(k)
        return ImageItem(image=Image(image), gt_label=torch.tensor(0),
                         gt_mask=Mask(torch.zeros(image.shape[1:], dtype=torch.uint8)))


def normal_images(run: Path | None, category: Category) -> tuple[list[Path], list[Path]]:
    """The images to train on, and those a run held out. Raises InputError where one is missing."""
    if run is None:
        return category.train, []
    record = read_json(run / "data.json")
    paths = {name_in(category, path): path for path in category.train}
    missing = [name for name in record["train"] + record["held_out"] if name not in paths]
    if missing:
        raise InputError(f"{category.root / missing[0]}: missing (and {len(missing) - 1} more), "
                         f"but {run} was trained with it")
    return [paths[name] for name in record["train"]], [paths[name] for name in record["held_out"]]


def data_module(train: Photos, validation: Photos, batch: int):
    """A Lightning data module of these images and no others: anomalib's own split them anew."""
    from anomalib.data import ImageBatch
    from lightning.pytorch import LightningDataModule

    class Split(LightningDataModule):
        name, category, train_batch_size = "photos", "", batch

        def loader(self, photos: Photos, shuffle: bool):
            return torch.utils.data.DataLoader(photos, batch, shuffle,
                                               collate_fn=ImageBatch.collate)

        def train_dataloader(self):
            return self.loader(train, True)

        def val_dataloader(self):
            return self.loader(validation, False)

    return Split()


# ---------------------------------------------------------------- training and maps

def train_model(model, train: Photos, validation: Photos, epochs: int, batch: int,
                device: torch.device) -> None:
    """Train with anomalib's engine. Its checkpoints go to a temporary folder."""
    from anomalib.engine import Engine
    own = model.trainer_arguments
    length = {} if "max_epochs" in own else \
        {"max_epochs": epochs, "check_val_every_n_epoch": epochs}
    with tempfile.TemporaryDirectory() as folder, fetching(model.name), silence():
        engine = Engine(default_root_dir=folder, devices=[device.index or 0] if
                        device.type == "cuda" else 1, accelerator="gpu" if device.type == "cuda"
                        else "cpu", enable_progress_bar=sys.stderr.isatty(),
                        enable_model_summary=False, **length)
        engine.fit(model, datamodule=data_module(train, validation, batch))


@torch.inference_mode()
def raw_maps(model, photos: Photos, device: torch.device) -> tuple[np.ndarray, list[float], float]:
    """Maps float32 [N, H, W], image scores and the median seconds of an image alone."""
    model = model.to(device).eval()
    maps, scores, seconds = None, [], []
    for k in progress_bar(range(len(photos)), desc="maps", unit="image", leave=False):
        image = photos.image(k)[None].to(device)
        start = time.perf_counter()
        output = model.model(model.pre_processor.transform(image))
        M = output.anomaly_map.float().cpu().numpy().squeeze()
        scores.append(float(output.pred_score.float().cpu().squeeze()))
        seconds.append(time.perf_counter() - start)
        maps = float_array((len(photos), *M.shape), 4.0) if maps is None else maps
        maps[k] = M
    if not np.isfinite(scores).all():
        raise InputError("the model returned scores that are not finite; train it with another "
                         "length or another seed")
    return maps, scores, statistics.median(seconds[1:] or seconds)


def epochs_of(name: str, epochs: int, steps: int, count: int, batch: int, own: dict) -> int:
    """The epochs of a training, from the flags, the model, or its authors. Raises InputError.

    count: training images; own: the trainer arguments that the model sets itself.
    """
    if "max_epochs" in own:
        if epochs or steps:
            raise InputError(f"--epochs, --steps: {name} always trains for {own['max_epochs']}")
        return own["max_epochs"]
    published = LENGTHS.get(name, {})
    if not epochs and not steps:
        epochs, steps = published.get("epochs", 0), published.get("steps", 0)
    if not epochs and not steps:
        raise InputError(f"--model {name}: anomalib sets no length for it; give --epochs or "
                         f"--steps")
    return epochs or math.ceil(steps / math.ceil(count / batch))


def option(text: str) -> tuple[str, object]:
    """NAME=VALUE of the command line; VALUE as Python writes it, or a word."""
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def command_line() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        description="Write the anomaly maps of a model of anomalib, trained on a category.")
    parser.add_argument("--model", required=True, help="Padim, Patchcore, ReverseDistillation, "
                        "EfficientAd, Supersimplenet, Dsr, Draem, or another of anomalib's")
    parser.add_argument("--data", help="mvtec, visa, btad, demo, or a folder of categories")
    parser.add_argument("--category", help="the category")
    parser.add_argument("--root", default="", help="folder of the data sets (default: "
                        "$TRANSFUSION_DATA or ./data)")
    parser.add_argument("--run", metavar="RUN", help="take data, category and the very training "
                        "images from this run; its held-out images serve for validation")
    parser.add_argument("--out", required=True, metavar="DIR", help="writes DIR/CATEGORY/test/"
                        "DEFECT/NNN.tiff, scores.csv and maps.json")
    parser.add_argument("--pre-trained", action=argparse.BooleanOptionalAction, default=None,
                        help="pretrained backbone, from the network (default: anomalib's)")
    parser.add_argument("--size", type=int, default=256, help="side to which images are resized "
                        "(default 256)")
    parser.add_argument("--epochs", type=int, default=0, help="length of the training (default: "
                        "the model's own, or that of its authors)")
    parser.add_argument("--steps", type=int, default=0, help="the same in steps, rounded up to "
                        "whole epochs")
    parser.add_argument("--batch", type=int, default=0, help="images in a step (default: that of "
                        "the method's authors)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--set", dest="options", type=option, action="append", default=[],
                        metavar="NAME=VALUE", help="an argument of the model in anomalib")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    for name in ("epochs", "steps", "batch"):
        if getattr(flags, name) < 0:
            raise InputError(f"--{name} {getattr(flags, name)}: must be positive")
    import_anomalib()
    device = pick_device(flags.device)
    run = Path(flags.run).expanduser() if flags.run else None
    if run and not flags.category:
        category, _ = find_run_category(run, flags.data or "", flags.root)
    elif not run and flags.data and flags.category:
        category = find_category(clean_data(flags.data), flags.category, root_folder(flags.root))
    else:
        raise InputError("give --data and --category, or --run RUN")
    options = dict(flags.options)
    textures = root_folder(flags.root) / "dtd"
    if flags.model == "Draem" and textures.is_dir():
        options.setdefault("dtd_dir", str(textures))
    write_model_maps(flags, category, run, options, device)


def write_model_maps(flags, category: Category, run: Path | None, options: dict,
                     device: torch.device) -> None:
    """Train the model that the flags name, and write its maps, scores and record."""
    anomalib = import_anomalib()
    from anomalib.data.transforms.utils import extract_transforms_by_type
    from lightning.pytorch import seed_everything
    from torchvision.transforms.v2 import Resize
    seed_everything(flags.seed, verbose=False)
    model = build_model(flags.model, flags.size, flags.pre_trained, options)
    transform = model.pre_processor.transform
    resize = (extract_transforms_by_type(transform, Resize) or [None])[0]
    paths, held_out = normal_images(run, category)
    batch = flags.batch or LENGTHS.get(flags.model, {}).get("batch", BATCH)
    epochs = epochs_of(flags.model, flags.epochs, flags.steps, len(paths), batch,
                       model.trainer_arguments)
    train = Photos(paths, resize)
    validation = Photos(held_out, resize) if held_out else train
    print(f"{flags.model} (anomalib {anomalib.__version__}) on {len(paths)} training images of "
          f"{category.name}, {epochs} epochs, {device}", flush=True)
    start = time.perf_counter()
    train_model(model, train, validation, epochs, batch, device)
    seconds = time.perf_counter() - start
    tests = Photos([item.path for item in category.test], resize)
    maps, scores, seconds_per_image = raw_maps(model, tests, device)
    folder = Path(flags.out).expanduser() / category.name
    write_maps(folder, category, maps, scores, {
        "method": flags.model, "map_side": map_side(transform),
        "package": f"anomalib {anomalib.__version__}",
        "pre_trained": model.hparams.get("pre_trained"),
        "options": options, "trained_on": f"the split of {run.name}" if run else "train/good",
        "training_images": len(paths),
        "validation": f"{len(held_out)} held out" if held_out else "the training images",
        "size": flags.size, "epochs": epochs, "batch": batch, "seed": flags.seed,
        "seconds_train": round(seconds, 1), "seconds_per_image": seconds_per_image,
        "hardware": hardware(str(device)), "torch": torch.__version__})
    print(f"{len(maps)} maps and scores.csv are in {folder}; next:")
    which = f"--run {flags.run}" if run else f"--data {flags.data} --category {category.name}"
    root = f" --root {flags.root}" if flags.root else ""
    print(f"python tools/score_maps.py {flags.out} {which}{root} --scores {folder / 'scores.csv'}")


if __name__ == "__main__":
    sys.exit(main())
