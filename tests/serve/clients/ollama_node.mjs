// argv: base URL, key. Ollama's client for node.
import assert from "node:assert";
import { Ollama } from "ollama";

const [host, key] = process.argv.slice(2);
const client = new Ollama({ host, headers: { Authorization: `Bearer ${key}` } });
const messages = [{ role: "user", content: "The weather?" }];
const options = { num_predict: 6, temperature: 0 };
assert((await client.list()).models[0].name === "base");
const whole = await client.chat({ model: "base", messages, options });
let text = "";
for await (const part of await client.chat({ model: "base", messages, options, stream: true }))
  text += part.message.content;
assert(text === whole.message.content);
