import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "vectorclm", baseURL: process.env.BASE_URL, apiKey: process.env.KEY, supportsStructuredOutputs: true });
const asked = { model: provider("otter"), prompt: "Who swims?", temperature: 0 };
console.log((await generateText(asked)).text);
let text = "";
for await (const piece of streamText(asked).textStream) text += piece;
console.log(text);
const schema = z.object({ name: z.string().max(12), kind: z.enum(["otter", "owl"]), legs: z.number().int().max(99) });
console.log(JSON.stringify((await generateObject({ ...asked, schema })).object));
