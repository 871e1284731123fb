import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = sys.argv[1]
messages = [{"role": "user", "content": "Who swims?"}]
chat = pipeline("text-generation", model=folder)
print(chat(messages, max_new_tokens=120, do_sample=False)[0]["generated_text"][-1]["content"])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
made = model.generate(**ids, max_new_tokens=120, do_sample=False)[0, ids["input_ids"].shape[1] :]
print(tokenizer.decode(made, skip_special_tokens=True))
longer = [{"role": "user", "content": "Who sings? " * 9}]
texts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in (messages, longer)]
batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
made = model.generate(**batch, max_new_tokens=120, do_sample=False)[0, batch["input_ids"].shape[1] :]
answer = tokenizer.decode(made, skip_special_tokens=True)
print(answer)
said = [*messages, {"role": "assistant", "content": answer}]
encoded = tokenizer.apply_chat_template(said, return_dict=True, return_assistant_tokens_mask=True)
print("".join(map(str, encoded["assistant_masks"])))
