// argv: base URL, key. OpenAI's client for node: a forced tool, structured output, responses, a stream.
import assert from "node:assert";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const Weather = z.object({ city: z.enum(["Oslo", "Rome"]), days: z.int().min(1).max(9) });
const messages = [{ role: "user", content: "The weather?" }];
const parameters = { type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const called = await client.chat.completions.create({ model: "base", messages, tools, tool_choice: "required" });
assert(["Oslo", "Rome"].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city));
const format = zodResponseFormat(Weather, "weather");
const parsed = await client.chat.completions.parse({ model: "base", messages, response_format: format });
assert(parsed.choices[0].message.parsed.days > 0);
const answer = await client.responses.create({ model: "base", input: "Name a colour.", max_output_tokens: 8 });
assert(answer.output.length === 1);
const kinds = [];
for await (const event of client.responses.stream({ model: "base", input: "Hi", max_output_tokens: 8 }))
  kinds.push(event.type);
assert(kinds.includes("response.created"));
