import dataclasses
import json

import torch

from mim4dd import evaluate, run
from mim4dd.data import load
from mim4dd.data.whitening import Whitening
from mim4dd.seeding import generator
from mim4dd.synthetic import SyntheticSet


def test_whitening_is_the_inverse_root_of_the_covariance(generator):
    mix = torch.randn(48, 48, generator=generator, dtype=torch.float64) / 40
    images = (0.5 + torch.randn(500, 48, generator=generator, dtype=torch.float64) @ mix).clamp(0, 1)
    whitening = Whitening.fit(images.float().view(500, 3, 4, 4))
    centred = images - images.mean(0)
    covariance = centred.T @ centred / 499
    root = torch.linalg.matrix_power(whitening.matrix.double(), 2)
    torch.testing.assert_close(
        root @ (covariance + 0.1 * torch.eye(48)), torch.eye(48).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(whitening.matrix, whitening.matrix.T, atol=1e-5, rtol=0)
    white = whitening.apply(images.float().view(500, 3, 4, 4))
    torch.testing.assert_close(
        white.flatten(1).double(), centred @ whitening.matrix.double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(whitening.invert(white).flatten(1), images.float(), atol=1e-4, rtol=0)


def test_bytes_are_fractions_of_255(generator):
    images = torch.randint(0, 256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8)
    one, other = Whitening.fit(images), Whitening.fit(images.float() / 255)
    torch.testing.assert_close(one.matrix, other.matrix)
    torch.testing.assert_close(one.apply(images), other.apply(images.float() / 255))


def test_rounding_does_not_make_other_data_of_whitened_images():
    """Experts trained on one machine are found again by another, which whitens a little differently."""
    images, _ = load("digits")
    white = images.whitened(Whitening.fit(images.images))
    elsewhere = dataclasses.replace(white, images=white.images * (1 + 1e-6))
    assert elsewhere.fingerprint == white.fingerprint
    other = dataclasses.replace(images, images=images.images.flip(0))
    rest, held_out = white.split(0.5, generator(0, "split"))
    all_of_them = images, white, other.whitened(white.whitening), rest, held_out
    assert len({one.fingerprint for one in all_of_them}) == 5


def test_a_whitened_run_is_scored_in_its_own_space(tmp_path, capsys):
    """The saved set holds all it takes to score it again, and its pictures are in true colours."""
    out = tmp_path / "a"
    options = ["--quick", "--zca", "--init", "real", "--iterations", "1", "--image-lr", "1e-6"]
    assert run.main([*options, "--validation", "0.2", "--num-eval", "0", "--out", str(out)]) == 0
    synthetic = SyntheticSet.load(out / "synthetic.safetensors")
    real = load("digits")[0].images.flatten(1).float()
    real = real / 255 if real.max() > 1 else real
    nearest = torch.cdist(synthetic.pixels.flatten(1), real).min(1).values
    assert nearest.max() < 0.02, "the start is made of real images"
    assert synthetic.images.std() > 0.3
    assert run.main([*options, "--eval-epochs", "30", "--overwrite", "--out", str(out)]) == 0
    accuracy = json.loads((out / "result.json").read_text())["accuracy_mean"]
    assert evaluate.main([str(out / "synthetic.safetensors"), "--num-eval", "1"]) == 0
    assert f"{100 * accuracy:.1f} %" in capsys.readouterr().out.splitlines()[-2]


def test_whitening_does_not_go_with_taking_images_apart(capsys):
    assert run.main(["--quick", "--zca", "--factor", "2"]) == 2
    assert "use one of them" in capsys.readouterr().err
