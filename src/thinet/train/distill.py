"""Learning from the dense network: its softened outputs as targets."""

from __future__ import annotations

import torch
from torch.nn import functional

from thinet.errors import ModelError


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of the softmax at temperature T, mean over the images.

    Hinton, Vinyals and Dean 2015, section 2: the factor keeps the gradient's size independent of T.

    Args:
        student: logits (images, classes).
        teacher: logits (images, classes), no gradient.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"the teacher gives logits of shape {tuple(teacher.shape)}, the model "
            f"{tuple(student.shape)}; they must have the same classes"
        )
    log_student = functional.log_softmax(student.float() / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
