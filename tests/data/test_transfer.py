"""A batch crosses to the device in one copy that nothing waits for, in both stages.

The meta device stands for a GPU; how bytes are packed is tested in tests/student/test_to_device.py.
"""

from __future__ import annotations

from typing import Any

import torch
from teacher_world import CLASSES, Points, Speaker, mlp
from torch import nn
from waits import Crossings

from kdcache.data.collate import collate
from kdcache.data.samples import Samples
from kdcache.data.transfer import to_device
from kdcache.models.model import Output, forward_on

META = torch.device("meta")


def test_named_inputs_cross_together() -> None:
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3)}
    with Crossings() as seen:
        there = to_device(batch, META)
    assert isinstance(there, dict) and list(there) == list(batch)
    assert all(x.device == META and x.shape == batch[name].shape for name, x in there.items())
    assert [x.dtype for x in seen.copies] == [torch.uint8]


def test_a_model_is_asked_without_waiting_for_its_inputs() -> None:
    one = collate([Samples(Points()).item(i) for i in range(3)]).inputs
    ids = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": torch.ones(2, 4).long()}

    def ask(module: nn.Module, inputs: Any) -> Output:
        return Output(module(**inputs) if isinstance(inputs, dict) else module(inputs), None)

    for inputs, module, shape in ((one, mlp(), (3, CLASSES)), (ids, Speaker(), (2, 4, 40))):
        module.to(META)
        with torch.no_grad(), Crossings() as seen:
            answer = forward_on(module, inputs, META, role="teacher", run=ask)
        assert answer.logits.shape == shape and len(seen.copies) == 1
