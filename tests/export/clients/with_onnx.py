import sys

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM

folder, file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


class Logits(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


ids = torch.arange(5, 45)[None]
torch.onnx.export(Logits(), (ids,), file, input_names=["input_ids"], dynamo=True)
with torch.no_grad():
    expected = Logits()(ids).numpy()
(found,) = onnxruntime.InferenceSession(file).run(None, {"input_ids": ids.numpy()})
print(float(np.abs(found - expected).max()))
