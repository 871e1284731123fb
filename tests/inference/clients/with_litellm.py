import os

import litellm

options = {"model": "openai/otter", "api_base": os.environ["BASE_URL"], "api_key": os.environ["KEY"], "temperature": 0}
question = [{"role": "user", "content": "Who swims?"}]
print(litellm.completion(messages=question, **options).choices[0].message.content)
stream = litellm.completion(messages=question, stream=True, **options)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
