"""Stores that are truncated, flipped, swapped or of another byte order; hostile header files.

Every one ends in one sentence, before a wrong token: 20 places of each kind of damage.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specmoe_compile
from specmoe_compile.errors import CheckpointError, SpecMoEError, StoreError
from specmoe_compile.hf.checkpoint import check_checkpoint_folder
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.header import _body_crc32, read_header
from tests.faults.common import TRIALS
from tests.helpers import save_tiny

IDS = torch.arange(1, 90)[None]  # meets every expert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("damage") / "model")


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    store = model.parent / "store"
    specmoe_compile.pack(model, store, progress=False)
    return store


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "store"))


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 700, text


def logits(model: Path, store: Path) -> torch.Tensor:
    loaded: Any = specmoe_compile.from_pretrained(
        model, device="cpu", store="disk", store_dir=store, progress=False
    )
    try:
        out: torch.Tensor = loaded(IDS).logits
        return out
    finally:
        specmoe_compile.close(loaded)


def refuse(model: Path, store: Path) -> None:
    with pytest.raises(SpecMoEError) as caught:
        logits(model, store)
    assert_one_sentence(caught.value)


def flip(data: np.ndarray, chance: random.Random) -> None:
    data[chance.randrange(data.size)] ^= 1 << chance.randrange(8)


def zero_page(data: np.ndarray, chance: random.Random) -> None:
    pages = data.reshape(-1, 4096)
    pages[chance.choice(np.flatnonzero(pages.any(axis=1)).tolist())] = 0


def swap_records(data: np.ndarray, chance: random.Random) -> None:
    records = data.reshape(24, -1)
    first, second = chance.sample(range(24), 2)
    records[[first, second]] = records[[second, first]]


def swap_pages(data: np.ndarray, chance: random.Random) -> None:
    pages = data.reshape(-1, 4096)
    first, second = chance.sample(np.flatnonzero(pages.any(axis=1)).tolist(), 2)
    pages[[first, second]] = pages[[second, first]]


def other_endian(data: np.ndarray, chance: random.Random) -> None:
    record = data.reshape(24, -1)[chance.randrange(24)]
    record[:] = record.view(np.uint32).byteswap().view(np.uint8)


@pytest.mark.parametrize("damage", [flip, zero_page, swap_records, swap_pages, other_endian])
def test_damaged_records_are_refused_when_they_are_read(
    damage: Callable[[np.ndarray, random.Random], None], packed: Path, store: Path
) -> None:
    sound = np.fromfile(packed / "experts.bin", dtype=np.uint8)
    for trial in range(TRIALS):
        data = sound.copy()
        damage(data, random.Random(trial))
        assert not np.array_equal(data, sound)
        data.tofile(store / "experts.bin")
        with pytest.raises(StoreError, match="does not match its checksum") as caught:
            DiskStore.open(store, verify=True)
        assert_one_sentence(caught.value)


@pytest.mark.parametrize("damage", [flip, swap_records, other_endian])
def test_damaged_records_give_no_token(
    damage: Callable[[np.ndarray, random.Random], None], model: Path, store: Path
) -> None:
    data = np.fromfile(store / "experts.bin", dtype=np.uint8)
    damage(data, random.Random(0))
    data.tofile(store / "experts.bin")
    refuse(model, store)


def test_truncated_stores_are_refused(model: Path, store: Path) -> None:
    path = store / "experts.bin"
    sizes = random.Random(0).sample(range(path.stat().st_size), TRIALS)
    for size in sorted(sizes, reverse=True):
        os.truncate(path, size)
        with pytest.raises(StoreError, match=r"truncated or damaged|cannot be read"):
            DiskStore.open(store)
    path.unlink()
    refuse(model, store)


def test_a_header_cut_or_flipped_anywhere_is_refused(store: Path) -> None:
    path, chance = store / "header.json", random.Random(0)
    sound = path.read_bytes()
    for trial in range(2 * TRIALS):
        data = bytearray(sound)
        place = chance.randrange(len(data) - 1)
        if trial % 2:
            del data[place:]
        else:
            data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            header = read_header(store)
        except StoreError as error:
            assert_one_sentence(error)
        else:  # white space, or a digit written in another way
            assert json.loads(data) == json.loads(sound), header


def altered(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a header that was changed on purpose, its own checksum right."""
    body = json.loads(path.read_text())
    body.pop("header_crc32")
    change(body)
    path.write_text(json.dumps({**body, "header_crc32": _body_crc32(body)}))


def set_layer(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["layers"][0].update(values)


def set_tensor(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["layers"][0]["tensors"][0].update(values)


def fewer_experts(body: dict[str, Any]) -> None:
    """Sizes that hold together, of another model's: 3 layers of 8 as one of 24."""
    layer = {**body["layers"][0], "num_experts": 24}
    body["layers"] = [layer]
    body["checksums"] = [[value for values in body["checksums"] for value in values]]


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no experts": set_layer(num_experts=0),
    "negative experts": set_layer(num_experts=-1),
    "experts as a fraction": set_layer(num_experts=8.0),
    "experts as a word": set_layer(num_experts="8"),
    "more experts than any disk": set_layer(num_experts=10**30),
    "a name that is a number": set_layer(name=7),
    "no tensors": set_layer(tensors=[]),
    "a record of another size": set_layer(record_bytes=1 << 62),
    "a negative record": set_layer(record_bytes=-4096),
    "negative dimensions": set_tensor(shape=[-64, -64]),
    "fractional dimensions": set_tensor(shape=[64.0, 64]),
    "huge dimensions": set_tensor(shape=[10**20, 10**20]),
    "a shape of another tensor": set_tensor(shape=[1]),
    "an offset outside": set_tensor(offset_bytes=1 << 40),
    "a negative offset": set_tensor(offset_bytes=-64),
    "a dtype that is none": set_tensor(dtype="nn"),
    "a dtype that is no word": set_tensor(dtype=["float32"]),
    "tensors with one name": lambda b: b["layers"][0]["tensors"].append(
        dict(b["layers"][0]["tensors"][0])
    ),
    "layers of another model": fewer_experts,
    "no layers": lambda b: b.update(layers=[], checksums=[]),
    "layers that are no list": lambda b: b.update(layers={"a": 1}),
    "source files that are no map": lambda b: b.update(source_files=[1]),
    "checksums that are no lists": lambda b: b.update(checksums=[1, 2, 3]),
    "checksums that are words": lambda b: b.update(checksums=[["x"] * 8] * 3),
    "top_k without end": lambda b: b.update(top_k=float("inf")),
    "top_k of none": lambda b: b.update(top_k=0),
    "another version": lambda b: b.update(version=10**9),
    "files with strange entries": lambda b: b.update(packed_from=[{"path": 1}]),
    "a million entries": lambda b: b.update(checksums=[[0] * 300_000] * 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_was_altered_on_purpose_is_refused(
    name: str, model: Path, store: Path
) -> None:
    altered(store / "header.json", HOSTILE[name])
    refuse(model, store)


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 100_000, "null", "[]", "{}", ""])
def test_a_header_that_is_none_is_refused(text: str, model: Path, store: Path) -> None:
    (store / "header.json").write_text(text)
    refuse(model, store)


@pytest.mark.parametrize(
    "journal",
    [
        "[" * 200_000,
        "[]\n",
        '{"fingerprint": "FP"}\n[]\n',
        '{"fingerprint": "FP"}\n{"layer": 0}\n',
        '{"fingerprint": "FP"}\n{"layer": 0, "source": null, "checksums": 3}\n',
    ],
)
def test_a_journal_that_is_none_of_ours_is_not_used(
    journal: str, model: Path, packed: Path, store: Path
) -> None:
    (store / "header.json").unlink()
    (store / "experts.bin").rename(store / "experts.bin.partial")
    journal = journal.replace("FP", read_header(packed).fingerprint)
    (store / "packing.journal").write_text(journal)
    specmoe_compile.pack(model, store, progress=False)
    assert (store / "experts.bin").read_bytes() == (packed / "experts.bin").read_bytes()
    assert {path.name for path in store.iterdir()} == {
        "experts.bin",
        "header.json",
        "packing.lock",
    }


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first_tensor(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[name].update(values)

    return change


@pytest.mark.parametrize(
    "change",
    [
        first_tensor(data_offsets=[-8, 100]),
        first_tensor(data_offsets=[100, 8]),
        first_tensor(data_offsets=[0.5, 8]),
        first_tensor(data_offsets=[0, 10**30]),
        first_tensor(data_offsets=3),
        first_tensor(shape=[10**15, 10**15]),
        first_tensor(shape=[-1]),
        first_tensor(shape=7),
        first_tensor(dtype=["F32"]),
        lambda header: header.update(x=None),
        lambda header: header.update({str(i): i for i in range(100_000)}),
    ],
)
def test_hostile_safetensors_headers_are_refused(
    change: Callable[[dict[str, Any]], Any], checkpoint: Path
) -> None:
    rewrite(checkpoint / "model.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint_folder(checkpoint)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("length", [0, 1 << 62, (1 << 64) - 1])
def test_a_header_of_an_absurd_length_is_refused(length: int, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="does not fit"):
        check_checkpoint_folder(checkpoint)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of its folder"),
        ({"weight_map": {"a": "x\0y"}}, "outside of its folder"),
        ({"weight_map": {"a": 3}}, "damaged"),
        ({"weight_map": {"a": 3, "b": "x"}}, "damaged"),
        ({"weight_map": []}, "damaged"),
        ({"weight_map": 3}, "damaged"),
        ([], "damaged"),
        ({"weight_map": {str(i): f"{i % 9}.safetensors" for i in range(200_000)}}, "lacks 9"),
    ],
)
def test_hostile_indexes_are_refused(index: Any, expected: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "secret.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    began_s = time.process_time()
    with pytest.raises(CheckpointError, match=expected) as caught:
        check_checkpoint_folder(checkpoint)
    assert_one_sentence(caught.value)
    assert time.process_time() - began_s < 60, "no hang"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_nested_without_end_is_refused(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "other")
    (checkpoint / name).write_text("[" * 300_000)
    with pytest.raises(CheckpointError, match="damaged"):
        check_checkpoint_folder(checkpoint)
