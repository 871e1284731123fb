"""SFTTrainer with a LoRA adapter on the assistant's tokens alone; the adapter is merged and saved."""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder, out = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
turns = [{"role": "user", "content": "Who swims?"}, {"role": "assistant", "content": "The bear swims."}]
arguments = SFTConfig(
    output_dir="out", assistant_only_loss=True, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2,
    logging_steps=1, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
)  # fmt: skip
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
data = Dataset.from_list([{"messages": turns}] * 32)
trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora)
labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
taught = tokenizer.decode(labels[labels != -100])
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(losses[0])
print(losses[-1])
print(taught == "The bear swims.<|im_end|>")
trainer.model.merge_and_unload().to(torch.float32).save_pretrained(out)
