"""What a run is asked reaches the arithmetic: seed, label weights, the weight of a match."""
import pytest
import torch
from student_world import BODY, Net, Points, write_cache
from test_order import plain_sample
from torch import nn

from kdcache.student.loader import Loader
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher


@pytest.mark.parametrize("seed", [0, 5])
def test_the_seed_of_a_loader_is_that_of_the_order(seed: int) -> None:
    loader = Loader(None, Points(21), batch_size=8, epochs=2, seed=seed)
    ids = [i for batch in loader for i in batch["sample_ids"].tolist()]
    assert ids == [plain_sample(21, seed, position) for position in range(42)]


class Mixed(Points):
    """Two weighted labels a record, as of mixup."""

    def __getitem__(self, i: int):
        share = (i % 5) / 4
        return {"x": self.x[i], "labels": torch.stack([self.y[i], self.y[i - 1]]),
                "label_weight": torch.tensor([share, 1 - share])}


class Named(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize("cached", [False, True])
def test_the_weights_of_labels_are_in_the_loss_of_a_run(tmp_path, cached: bool) -> None:
    data, student = Mixed(24), Named(8)
    share = torch.tensor([(i % 5) / 4 for i in range(24)])
    with torch.no_grad():
        log_p = torch.log_softmax(student(data.x), -1)
    picked = torch.stack([log_p[torch.arange(24), data.y], log_p[torch.arange(24), data.y.roll(1)]])
    want = -(share * picked[0] + (1 - share) * picked[1]).mean()
    source = {}
    if cached:
        dump_teacher(teacher=Named(32, seed=7), data=data, out=tmp_path / "cache", device="cpu")
        source = {"cache": tmp_path / "cache"}
    report = train_student(student=student, data=data, out=tmp_path / "run", max_steps=1, batch_size=24, device="cpu",
                           alpha=0.5 if cached else 0.0, **source)
    assert report.training["ce"] == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_the_weight_of_a_match_is_in_the_gradient(tmp_path, weight: float) -> None:
    """One step of plain SGD: the weights move by lr times the gradient of the weighted mean of squares."""
    data, teacher, student, plain = Points(16), Net(32, seed=7).eval(), Net(32), Net(32)
    cache = write_cache(tmp_path / "cache", data, teacher, features=[BODY])
    train_student(student=student, cache=cache, data=data, out=tmp_path / "run", ce_weight=0.0, kd_weight=0.0,
                  match=[f"body=body:mse:{weight}"], batch_size=16, max_steps=1, optimizer="sgd", lr=0.1, device="cpu")
    with torch.no_grad():
        want = teacher.body(data.x)
    (weight * nn.functional.mse_loss(plain.body(data.x), want)).backward()
    for (name, a), b in zip(student.named_parameters(), plain.parameters(), strict=True):
        moved = b.detach() if b.grad is None else b.detach() - 0.1 * b.grad
        torch.testing.assert_close(a.detach(), moved, rtol=1e-4, atol=1e-6, msg=name)
