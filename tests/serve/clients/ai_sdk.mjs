// argv: base URL, key. Vercel's AI SDK by its defaults (the Responses API), and by chat completions.
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const [url, apiKey] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey });
const schema = z.object({ city: z.enum(["Oslo", "Rome"]), days: z.int().min(1).max(9) });
for (const model of [openai("base"), openai.chat("base")]) {
  const { text } = await generateText({ model, prompt: "Name a colour.", maxOutputTokens: 8 });
  assert(typeof text === "string");
  const shaped = await generateText({ model, prompt: "The weather?", output: Output.object({ schema }) });
  assert(shaped.output.days > 0);
  const weather = tool({ description: "The weather.", inputSchema: schema, execute: async () => "rain" });
  const called = await generateText({ model, prompt: "The weather?", tools: { weather }, toolChoice: "required" });
  assert(called.toolCalls[0].toolName === "weather");
  assert(called.toolResults[0].output === "rain");
  const stream = streamText({ model, prompt: "Name a colour.", maxOutputTokens: 8 });
  let parts = 0;
  for await (const part of stream.fullStream) {
    assert(part.type !== "error", String(part.error));
    parts += 1;
  }
  assert(parts > 2);
}
