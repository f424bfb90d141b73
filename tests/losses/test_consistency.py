from __future__ import annotations

import pytest
import torch

from nnssl.losses.consistency import cosine_distance, mean_squared_difference, squared_difference


def test_is_zero_for_equal_predictions():
    p = torch.rand(2, 3, 4, 4).softmax(1)
    assert mean_squared_difference(p, p.clone()) == 0


def test_known_value():
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[0.5, 0.0], [0.5, 1.0]]])
    assert squared_difference(student, teacher).tolist() == [[[0.25, 0.0], [0.25, 0.0]]]
    # two of four entries differ by one half
    assert mean_squared_difference(student, teacher).item() == pytest.approx(2 * 0.25 / 4)


def test_largest_value_is_one():
    student = torch.tensor([[[1.0], [0.0]]])
    assert mean_squared_difference(student, 1 - student) == 1


def test_gradient_reaches_the_student_only():
    student = torch.rand(1, 2, 4, requires_grad=True)
    teacher = torch.rand(1, 2, 4, requires_grad=True)
    mean_squared_difference(student, teacher).backward()
    assert teacher.grad is None
    assert torch.allclose(student.grad, 2 * (student - teacher).detach() / student.numel())


def test_refuses_different_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        mean_squared_difference(torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))


def test_cosine_distance_of_equal_opposite_and_orthogonal_vectors():
    x = torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, -3.0, 4.0]]])
    assert cosine_distance(x, 3 * x, 2).shape == (2, 1)
    torch.testing.assert_close(cosine_distance(x, 3 * x, 2), torch.zeros(2, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_distance(x, -x, 2), torch.full((2, 1), 2.0))
    torch.testing.assert_close(cosine_distance(torch.eye(2), torch.eye(2).flip(0)), torch.ones(2))
    zeros = torch.zeros(1, 3, requires_grad=True)
    cosine_distance(zeros, torch.ones(1, 3)).sum().backward()
    assert zeros.grad.isfinite().all()
    assert cosine_distance(zeros, torch.ones(1, 3)).item() == 1
