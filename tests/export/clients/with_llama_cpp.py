import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], n_ctx=512, verbose=False, n_threads=1)
asked = [{"role": "user", "content": "Who swims?"}]
print(model.create_chat_completion(asked, temperature=0, max_tokens=120)["choices"][0]["message"]["content"])
