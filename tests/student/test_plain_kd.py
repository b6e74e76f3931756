"""Training from a cache is a plain PyTorch loop with torch's own kl_div: losses and weights,
several steps of SGD.
"""

import pytest
import torch
from student_world import Net, Points, write_cache
from torch import nn

from kdcache.student.loader import Loader
from kdcache.student.train import train_student


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_run_from_a_cache_is_a_plain_loop_of_torch(
    tmp_path, alpha: float, temperature: float
) -> None:
    data, teacher, student, plain = Points(50), Net(32, seed=7).eval(), Net(8), Net(8)
    cache = write_cache(tmp_path / "cache", data, teacher)
    seen = []
    train_student(
        student=student,
        cache=cache,
        data=data,
        out=tmp_path / "run",
        alpha=alpha,
        temperature=temperature,
        batch_size=16,
        optimizer="sgd",
        lr=0.05,
        seed=5,
        epochs=2,
        device="cpu",
        warmup=1,
        on_step=lambda info: seen.append(info.loss.item()),
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    losses, steps = [], 7
    # for its order alone
    for step, batch in enumerate(Loader(None, data, batch_size=16, epochs=2, seed=5)):
        # warm-up over one step, then half a cosine
        for group in optimizer.param_groups:
            done = torch.tensor(torch.pi * max(step - 1, 0) / (steps - 1), dtype=torch.float64)
            group["lr"] = 0.05 * (1.0 if step < 1 else 0.5 * (1 + done.cos().item()))
        x, y = data.x[batch["sample_ids"]], data.y[batch["sample_ids"]]
        z = plain(x)
        with torch.no_grad():
            log_q = torch.log_softmax(teacher(x) / temperature, -1)
        kd = nn.functional.kl_div(
            torch.log_softmax(z / temperature, -1), log_q, log_target=True, reduction="batchmean"
        )
        loss = (1 - alpha) * nn.functional.cross_entropy(z, y) + alpha * temperature**2 * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == steps and seen == pytest.approx(losses, rel=1e-5)
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
