"""Apollo's weights as they are on disk: what is read, and that nothing else gets in."""

import contextlib
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_e2e.apollo.checkpoint import ONLY_SAE, load_tensors, read_checkpoint
from tests.apollo import HOOK, parameters, state_dict

OTHER = "blocks.0.mlp.hook_post"
SAE = parameters(d_in=3, d_sae=5)


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def refuses(path: Path, *parts: str) -> None:
    """`read_checkpoint` must fail with one line that says all of `parts`, and the file."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_checkpoint_of_a_run_has_its_saes_by_hook(tmp_path: Path) -> None:
    other = parameters(d_in=4, d_sae=6, seed=1)
    saes = read_checkpoint(save(tmp_path / "samples_1.pt", state_dict({HOOK: SAE, OTHER: other})))
    assert list(saes) == [HOOK, OTHER]
    assert (saes[HOOK].d_in, saes[HOOK].d_sae) == (3, 5)
    for hook, expected in {HOOK: SAE, OTHER: other}.items():
        assert torch.equal(saes[hook].encoder_weight, expected["encoder.weight"])
        assert torch.equal(saes[hook].encoder_bias, expected["encoder.bias"])
        # Read as it is; it is normalised where the SAE is made.
        assert torch.equal(saes[hook].decoder_weight, expected["decoder.weight"])
        assert torch.equal(saes[hook].decoder_bias, expected["decoder.bias"])


def test_a_file_of_the_hub_does_not_say_where_its_sae_sits(tmp_path: Path) -> None:
    saes = read_checkpoint(save(tmp_path / "e2e.pt", SAE))
    assert list(saes) == [ONLY_SAE]
    assert torch.equal(saes[ONLY_SAE].decoder_weight, SAE["decoder.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    (sae,) = read_checkpoint(save(tmp_path / "x.pt", {k: v.to(dtype) for k, v in SAE.items()})).values()
    for read, name in ((sae.encoder_weight, "encoder.weight"), (sae.decoder_weight, "decoder.weight")):
        torch.testing.assert_close(read, SAE[name].to(dtype).float(), rtol=0, atol=0)


def test_parameters_are_read_without_their_gradients(tmp_path: Path) -> None:
    (sae,) = read_checkpoint(save(tmp_path / "x.pt", {k: torch.nn.Parameter(v) for k, v in SAE.items()})).values()
    assert not sae.encoder_weight.requires_grad


@pytest.mark.parametrize("name", SAE)
@pytest.mark.parametrize("of_a_run", [True, False])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str, of_a_run: bool) -> None:
    lacking = {k: v for k, v in SAE.items() if k != name}
    refuses(save(tmp_path / "x.pt", state_dict({HOOK: lacking}) if of_a_run else lacking), f"{name!r} is missing")


def test_what_is_missing_is_missing_at_its_hook(tmp_path: Path) -> None:
    lacking = {k: v for k, v in SAE.items() if k != "decoder.bias"}
    refuses(save(tmp_path / "x.pt", state_dict({HOOK: SAE, OTHER: lacking})), OTHER, "'decoder.bias' is missing")


@pytest.mark.parametrize(
    "key", ["b_pre", "encoder.2.weight", "blocks-2-hook_resid_pre.scale", "optimizer", "xdecoder.weight"]
)
def test_a_tensor_too_many_is_named(tmp_path: Path, key: str) -> None:
    refuses(save(tmp_path / "x.pt", {**SAE, key: torch.ones(5)}), repr(key))


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    refuses(save(tmp_path / "x.pt", {**SAE, "encoder.0.bias": SAE["encoder.bias"]}), "encoder.0.bias", "two names")


def test_an_sae_with_its_hook_beside_one_without(tmp_path: Path) -> None:
    refuses(
        save(tmp_path / "x.pt", {**state_dict({HOOK: SAE}), **SAE}), "'encoder.weight'", "does not say at which hook"
    )


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("encoder.weight", (5,), "[5], not [d_sae, d_in]"),
        ("encoder.weight", (0, 3), "[0, 3], not [d_sae, d_in]"),
        ("encoder.bias", (4,), "it must be [5]"),
        ("decoder.weight", (5, 3), "it must be [3, 5]"),
        ("decoder.bias", (1,), "it must be [3]"),
        ("decoder.bias", (), "it must be [3]"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    tmp_path: Path, name: str, shape: tuple[int, ...], says: str
) -> None:
    path = save(tmp_path / "x.pt", state_dict({HOOK: {**SAE, name: torch.ones(shape)}}))
    refuses(path, HOOK, f"{name} has shape {list(shape)}", says)


@pytest.mark.parametrize("name", SAE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(tmp_path: Path, name: str, value: float) -> None:
    broken = SAE[name].clone()
    broken.flatten()[-1] = value
    refuses(save(tmp_path / "x.pt", state_dict({HOOK: {**SAE, name: broken}})), HOOK, name, "not finite numbers")


def test_a_decoder_of_zeros_is_refused(tmp_path: Path) -> None:
    zeros = torch.zeros_like(SAE["decoder.weight"])
    refuses(save(tmp_path / "x.pt", {**SAE, "decoder.weight": zeros}), "decoder.weight is all zeros")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_values_of_another_kind(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(tmp_path / "x.pt", {**SAE, "encoder.bias": SAE["encoder.bias"].to(dtype)})
    refuses(path, "encoder.bias", "not finite numbers")


def test_a_number_beyond_float32(tmp_path: Path) -> None:
    beyond = torch.full((5,), 1e300, dtype=torch.float64)
    refuses(save(tmp_path / "x.pt", {**SAE, "encoder.bias": beyond}), "encoder.bias", "not finite numbers")


@pytest.mark.parametrize("tensor", [torch.eye(5, 3).to_sparse(), torch.empty(5, 3, device="meta")])
def test_tensors_without_values_in_them(tmp_path: Path, tensor: torch.Tensor) -> None:
    refuses(save(tmp_path / "x.pt", {**SAE, "encoder.weight": tensor}), "'encoder.weight' is not a dense tensor")


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {}, 7, None])
def test_what_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    refuses(save(tmp_path / "x.pt", content), "not a state dict")


@pytest.mark.parametrize("entry", [{"epoch": 3}, {3: torch.ones(3)}, {"model": {"encoder.bias": torch.ones(3)}}])
def test_a_state_dict_with_something_else_in_it(tmp_path: Path, entry: dict[Any, Any]) -> None:
    refuses(save(tmp_path / "x.pt", {**SAE, **entry}), repr(next(iter(entry))), "not a state dict")


def test_a_whole_module_is_not_loaded(tmp_path: Path) -> None:
    refuses(save(tmp_path / "x.pt", torch.nn.Linear(2, 2)), "was not loaded")


class Intruder:
    """What a pickle may hold: an instruction to call something when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside_the_weights", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool, beside_the_weights: bool) -> None:
    marker = tmp_path / "marker"
    content = {**SAE, "encoder.bias": Intruder(marker)} if beside_the_weights else Intruder(marker)
    path = save(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    # The file does what it is feared to do where it is trusted.
    torch.load(path, weights_only=False)
    assert marker.is_dir()
    marker.rmdir()
    refuses(path, "would run code", "was not loaded")
    assert not marker.exists()


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"P", b"PK\x03\x04", b"seed: 0\nlr: 0.001\n", b"\x80\x02}q\x00.", b"{}"])
def test_what_is_no_checkpoint_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    refuses(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_however_it_is_truncated_or_damaged_it_is_refused_in_one_line(tmp_path: Path, zipped: bool) -> None:
    path = save(tmp_path / "x.pt", SAE, _use_new_zipfile_serialization=zipped)
    whole, rng = path.read_bytes(), random.Random(0)
    for length in (*range(0, len(whole) - 200, 23), *range(len(whole) - 200, len(whole) - 1)):
        path.write_bytes(whole[:length])
        refuses(path)
    n_read = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        # What hits the digits of a number cannot be seen; anything else must be refused, and as this error.
        with contextlib.suppress(ValueError):
            read_checkpoint(path)
            n_read += 1
    assert n_read < 200


def test_any_state_dict_is_read_as_tensors(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    tensors = load_tensors(save(tmp_path / "model.pt", model.state_dict()))
    assert list(tensors) == ["weight", "bias"]
    assert torch.equal(tensors["weight"], model.weight)
