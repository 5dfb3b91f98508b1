import numpy as np
import pytest
import torch

from posthoc import PosthocError
from posthoc.adapters.training import TrainOptions
from posthoc.recipes.classifier import ClassifierOptions, as_input, shifted, train_classifier
from posthoc.recipes.digits import load_digits
from posthoc.recipes.networks import SmallConvNet


def test_pixels_become_numbers_from_minus_one_to_one():
    grey = np.array([[[0, 255], [51, 102]]], dtype=np.uint8)
    torch.testing.assert_close(as_input(grey), torch.tensor([[[[-1.0, 1.0], [-0.6, -0.2]]]]))
    colour = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    colour[1, 2, 3, 1] = 255
    assert as_input(colour).shape == (2, 3, 4, 5)
    assert as_input(colour)[1, 1, 2, 3] == 1.0
    for wrong in (grey[0], grey.astype(np.float32), grey[:0]):
        with pytest.raises(PosthocError, match="uint8 images"):
            as_input(wrong)


def test_a_shift_moves_every_image_by_its_own_step():
    images = torch.rand(12, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    moved = shifted(images, 2, torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(3)
    down, right = (torch.randint(5, (12, 1), generator=draw).flatten() - 2 for _ in range(2))
    for i in range(12):
        for y in range(6):
            for x in range(5):
                source = (min(max(y + int(down[i]), 0), 5), min(max(x + int(right[i]), 0), 4))
                assert torch.equal(moved[i, :, y, x], images[i, :, source[0], source[1]])
    assert len({(int(a), int(b)) for a, b in zip(down, right, strict=True)}) > 6


def test_it_learns_digits_and_repeats_itself():
    digits = load_digits(known=10)
    pixels = np.stack([np.asarray(one) for one in digits.images])
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        network = SmallConvNet(1, 10, 16)
        result = train_classifier(
            network,
            pixels[digits.train],
            digits.label[digits.train],
            classifier=ClassifierOptions(shift=1),
            options=TrainOptions(epochs=12, batch_size=64, progress=False),
        )
        with torch.no_grad():
            right = network(as_input(pixels[digits.test])).argmax(1).numpy() == digits.label[digits.test]
        runs.append((result.held_out, right))
    assert runs[0][1].mean() > 0.93
    assert runs[0][0] == runs[1][0]
    assert runs[0][0][-1] < 0.3 * runs[0][0][0]


def test_labels_that_do_not_fit_are_named():
    with pytest.raises(PosthocError, match=r"10 images need as many labels; given \(9,\)"):
        train_classifier(SmallConvNet(), np.zeros((10, 8, 8), np.uint8), np.zeros(9))
