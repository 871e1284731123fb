import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

options = {"model": "otter", "api_base": os.environ["BASE_URL"], "api_key": os.environ["KEY"], "temperature": 0}
chat = OpenAILike(is_chat_model=True, context_window=512, **options)
print(chat.chat([ChatMessage(role="user", content="Who swims?")]).message.content)
print("".join(part.delta or "" for part in chat.stream_chat([ChatMessage(role="user", content="Who swims?")])))
texts = OpenAILike(context_window=512, max_tokens=20, **options)  # its default: /v1/completions
print(len(texts.complete("The otter swims").text) > 0)
