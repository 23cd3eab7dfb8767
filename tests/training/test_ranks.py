"""What two ranks must have in common is compared before the first step; what differs is named."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_training import BOOK, IMAGES, TARGETS, make_config, make_model

from coded_resnext import Codebook
from coded_resnext.cli.train import Command, open_data, run_recipe
from coded_resnext.data.augment import Augmentation, TrainTransform
from coded_resnext.data.batches import Batch, TrainingBatches, batches
from coded_resnext.data.loaders import TrainImages
from coded_resnext.data.preprocessing import Preprocessing
from coded_resnext.training import step as step_module
from coded_resnext.training.engine import fit
from coded_resnext.training.processes import World, run_script, training_session
from coded_resnext.training.recipe import RECIPES, load_recipe
from coded_resnext.training.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")
# Beside others on the machine, a process takes a while until it has joined the other.
PATIENCE = 240.0


def start_ranks(body: Callable[[int], Any], folder: Path) -> list[int]:
    """Fork two processes that could join each other; what their body returns is JSON in a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            # It outlives nobody.
            signal.alarm(int(PATIENCE) + 60)
            try:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                sys.stderr = (folder / f"{rank}.log").open("w")
                # What a process that does not end was waiting for.
                faulthandler.dump_traceback_later(PATIENCE - 5, file=sys.stderr)
                (folder / f"{rank}.json").write_text(json.dumps(body(rank)))
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


def wait(child: int) -> int:
    """The status of a child that ends in time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("a process has not ended")


def attempt(
    world: World, folder: Path, model: Any = None, images: int = 24, **changes: Any
) -> str | None:
    """The sentence with which a training of a single epoch is refused, if it is."""
    config = make_config(**{"epochs": 1, "warmup_epochs": 0, **changes})
    loader = TrainingBatches(
        IMAGES[:images],
        TARGETS[:images],
        config.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )
    run = RunFolder(folder, {}, world=world)
    try:
        fit(model or make_model(), loader, batches(IMAGES, TARGETS), config, run, world=world)
    except ValueError as error:
        return str(error)
    return None


def network(words: tuple[str, ...] = (), names: tuple[str, ...] = ("a", "b", "c")) -> Any:
    """A network of other codewords or class names."""
    small = make_model()
    book = Codebook.from_words(words or BOOK.words, class_names=names)
    return type(small).from_config(small.config, [book], class_names=names)


def all_differences(folder: Path) -> dict[str, str | None]:
    """What is said where the second rank has something else than the first, in turn."""
    with training_session("cpu") as world:
        second = world.rank == 1

        def refused(name: str, **changes: Any) -> str | None:
            return attempt(world, folder / name, **changes)

        said = {
            "nothing": refused("nothing"),
            "lr": refused("lr", lr=0.5 if second else 0.01),
            "epochs": refused("epochs", epochs=1 + world.rank),
            "seed": refused("seed", seed=world.rank),
            "batch size": refused("batch size", batch_size=4 + 4 * world.rank),
            "images": refused("images", images=24 - 3 * world.rank),
            "codewords": refused(
                "codewords", model=network(("0011", "1100", "0110") if second else ())
            ),
            "class names": refused(
                "class names", model=network(names=("a", "b", "d") if second else ("a", "b", "c"))
            ),
            "network": refused("network", model=make_model(stem_channels=8 + 8 * world.rank)),
        }
        if second:
            own = step_module.versions()
            step_module.versions = lambda: {**own, "coded_resnext": "0.0.1"}  # type: ignore[attr-defined]
        return {**said, "version": refused("version")}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What both ranks said."""
    folder = tmp_path_factory.mktemp("ranks")
    children = start_ranks(lambda _: all_differences(folder), folder)
    assert [wait(child) for child in children] == [0, 0], (folder / "0.log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("lr", "training.lr on process 0 0.01, on process 1 0.5"),
        ("epochs", "training.epochs on process 0 1, on process 1 2"),
        ("seed", "training.seed on process 0 0, on process 1 1"),
        ("batch size", "data.steps_per_epoch on process 0 6, on process 1 3"),
        ("images", "data.images on process 0 24, on process 1 21"),
        ("codewords", "network.codebooks.0.codewords"),
        ("class names", "on process 0 'c', on process 1 'd'"),
        ("network", "network.config.stem_channels on process 0 8, on process 1 16"),
        ("version", "versions.coded_resnext on process 0"),
    ],
)
def test_ranks_that_were_told_different_things_do_not_train(
    said: list[dict[str, str | None]], what: str, named: str
) -> None:
    """Nothing in torch compares them: pytorch's ranks with other numbers of steps hang or abort."""
    first, second = said
    assert first["nothing"] is None
    sentence = first[what]
    assert sentence is not None
    assert sentence.startswith("processes: expected the same on all of a run: ")
    assert named in sentence
    assert second[what] == sentence


def test_a_rank_of_another_recipe_is_refused_before_it_opens_anything(tmp_path: Path) -> None:
    def body(rank: int) -> int:
        recipe = load_recipe(
            RECIPES / "cifar10_small.yaml", {"dataset": "synthetic", "lr": (0.01, 0.5)[rank]}
        )
        command = Command(recipe, tmp_path / "run", False, False, "cpu", timeout=60.0)
        return run_script("cifar.py", lambda: run_recipe(command))

    children = start_ranks(body, tmp_path)
    assert [wait(child) for child in children] == [0, 0]
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == ["2", "2"]
    assert "lr on process 0 0.01, on process 1 0.5" in (tmp_path / "1.log").read_text()
    assert not (tmp_path / "run").exists()


def test_running_statistics_begin_as_those_of_the_first_rank(tmp_path: Path) -> None:
    """DistributedDataParallel makes parameters equal, buffers not in every version."""

    def body(rank: int) -> list[float]:
        with training_session("cpu") as world:
            model = make_model()
            buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            for buffer in buffers:
                buffer.fill_(1 + rank)
            step_module.TrainStep(model, make_config(), world, 1)
            return [float(buffer.mean()) for buffer in buffers]

    children = start_ranks(body, tmp_path)
    assert [wait(child) for child in children] == [0, 0]
    for rank in range(2):
        assert set(json.loads((tmp_path / f"{rank}.json").read_text())) == {1.0}


def test_a_rank_that_waits_for_another_ends_at_the_second_signal(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        with training_session("cpu") as world:
            world.add(torch.ones(1))
            (tmp_path / f"joined-{rank}").touch()
            if rank == 1:
                time.sleep(PATIENCE)
            world.add(torch.ones(1))

    waiting, sleeping = start_ranks(body, tmp_path)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "joined-0").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(waiting, signal.SIGTERM)
        time.sleep(1.3)
        os.kill(waiting, signal.SIGTERM)
        second = time.monotonic()
        assert wait(waiting) == 143
        assert time.monotonic() - second < 10
    finally:
        os.kill(sleeping, signal.SIGKILL)
        os.waitpid(sleeping, 0)


def test_a_rank_gives_up_on_another_after_the_time_that_was_set(tmp_path: Path) -> None:
    def body(rank: int) -> str:
        try:
            with training_session("cpu", timeout=3.0) as world:
                world.add(torch.ones(1))
                if rank == 1:
                    time.sleep(8)
                world.add(torch.ones(1))
        except RuntimeError as error:
            return str(error)
        return "finished"

    children = start_ranks(body, tmp_path)
    begun = time.monotonic()
    assert wait(children[0]) == 0
    assert time.monotonic() - begun < 60
    wait(children[1])
    assert (tmp_path / "0.json").read_text() != '"finished"'
    with (
        pytest.raises(ValueError, match="timeout: expected seconds above 0"),
        training_session(timeout=0),
    ):
        pass


def test_one_rank_lists_the_images_and_tells_the_other(tmp_path: Path) -> None:
    """torchvision#557, #617: eight ranks asked a network file system for all of it eight times."""
    from PIL import Image

    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{index}.png")
    settings = {"dataset": "folder", "data_dir": str(tmp_path / "data"), "train_images": None}
    recipe = load_recipe(RECIPES / "cifar10_small.yaml", settings)

    def body(rank: int) -> list[Any]:
        scandir, listed = os.scandir, []
        os.scandir = lambda folder: (listed.append(str(folder)), scandir(folder))[1]  # type: ignore
        with training_session("cpu") as world:
            splits = open_data(recipe, world)
        return [len(listed), len(splits.train), splits.train.name(5), splits.test.targets.tolist()]

    children = start_ranks(body, tmp_path)
    assert [wait(child) for child in children] == [0, 0], (tmp_path / "1.log").read_text()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] >= 3
    assert second[0] == 0
    assert first[1:] == second[1:]


class Failing:
    """Images that a reader process cannot read, for a reason that is no damage."""

    targets = TARGETS

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Any:
        raise AssertionError("of some library")


class Reading(TrainingBatches):
    """The same order, and images that a process is to read."""

    def __iter__(self) -> Iterator[Batch]:
        preprocessing = Preprocessing(6, 1, (0.5,), (0.25,))
        transform = TrainTransform(Augmentation(crop_padding=1), preprocessing)
        yield from TrainImages(Failing(), transform, 8, seed=0, workers=1)  # type: ignore[arg-type]


def with_a_failing_reader(rank: int, folder: Path) -> None:
    """A rank, of which the second has a reader process that fails."""

    def main() -> None:
        with training_session("cpu", timeout=60.0) as world:
            config = make_config(epochs=1, warmup_epochs=0)
            kind = Reading if rank else TrainingBatches
            loader = kind(IMAGES, TARGETS, 8, seed=0, rank=rank, world_size=2)
            run = RunFolder(folder / "run", {}, world=world)
            fit(make_model(), loader, batches(IMAGES, TARGETS), config, run, world=world)

    status = run_script("train.py", main)
    sys.stderr.flush()
    os._exit(status)


def test_a_reader_that_fails_on_one_rank_ends_both(tmp_path: Path) -> None:
    """infinibatch#17, pytorch#26072, #39869: it was said, and both waited for ever."""
    start = time.monotonic()
    children = start_ranks(lambda rank: with_a_failing_reader(rank, tmp_path), tmp_path)
    assert 0 not in [wait(child) for child in children]
    # Not by the half hour that a rank waits for another one, but at once.
    assert time.monotonic() - start < 120
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert "a process that reads images has failed: AssertionError: of some library" in logs[1]
    assert "train.py: another process has ended, or gives no answer: " in logs[0]
    assert "Traceback" not in logs[0] + logs[1]
