// Every endpoint, parameter and error of the gateway, by the official Node client. Prints one JSON document; throws where something is off.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const CHAT = "tiny-llama";
const EMBED = "all-MiniLM-L6-v2";
const messages = [{ role: "user", content: "Say hello" }];
const done = [];

async function refused(work, status, code, param) {
  const error = await work.then(
    () => assert.fail(`${code} was expected`),
    (caught) => caught,
  );
  assert.equal(error.status, status, error.message);
  assert.equal(error.code, code);
  if (param !== undefined) assert.equal(error.param, param);
  assert.match(error.requestID, /^req_/);
  done.push(code);
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.ok(models.includes(CHAT) && models.includes(EMBED));
assert.equal((await client.models.retrieve(CHAT)).id, CHAT);
done.push("models");

const asked = { model: CHAT, messages, max_completion_tokens: 12, seed: 11, temperature: 0.9, top_p: 0.95 };
const { data: whole, response } = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 3 }).withResponse();
assert.ok(whole.choices[0].message.content.length > 0);
assert.equal(whole.choices[0].logprobs.content.length, whole.usage.completion_tokens);
assert.equal(whole.choices[0].logprobs.content[0].top_logprobs.length, 3);
for (const name of ["job", "receipt", "provider", "cost", "verdict"]) assert.ok(response.headers.get(`x-gpumarket-${name}`), name);
done.push("chat");

let text = "";
let last;
let usage;
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.choices.length) last = chunk;
  else usage = chunk.usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.ok(last.gpumarket.receipt.startsWith("0x"));
assert.deepEqual(usage, whole.usage);
done.push("chat stream");

const several = await client.chat.completions.create({ ...asked, n: 2 });
assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1]);
assert.equal(several.choices[0].message.content, whole.choices[0].message.content);
assert.notEqual(several.choices[0].message.content, several.choices[1].message.content);
done.push("chat n");

const full = whole.choices[0].message.content;
const stop = full.slice(4, 6);
const stopped = await client.chat.completions.create({ ...asked, stop: [stop] });
assert.equal(stopped.choices[0].message.content, full.slice(0, full.indexOf(stop)));
assert.equal(stopped.choices[0].finish_reason, "stop");
done.push("chat stop");

const completed = await client.completions.create({ model: CHAT, prompt: ["Once", "Twice"], max_tokens: 6, logprobs: 2, seed: 3 });
assert.equal(completed.choices.length, 2);
assert.equal(completed.choices[0].logprobs.tokens.length, 6);
let continued = "";
for await (const chunk of await client.completions.create({ model: CHAT, prompt: "Once", max_tokens: 6, seed: 3, stream: true }))
  continued += chunk.choices[0].text;
assert.equal(continued, completed.choices[0].text);
done.push("completions");

const vectors = await client.embeddings.create({ model: EMBED, input: ["a red fox", "ein roter Fuchs"] });
const plain = await client.embeddings.create({ model: EMBED, input: "a red fox", encoding_format: "float" });
assert.equal(vectors.data.length, 2);
assert.equal(plain.data[0].embedding.length, 384);
assert.ok(Math.abs(plain.data[0].embedding[0] - vectors.data[0].embedding[0]) < 1e-5);
assert.equal((await client.embeddings.create({ model: EMBED, input: [101, 2417, 102] })).usage.prompt_tokens, 3);
done.push("embeddings");

const answered = await client.responses.create({ model: CHAT, input: "Say hello", max_output_tokens: 8, instructions: "Be brief." });
assert.ok(answered.output_text.length > 0);
assert.equal(answered.usage.output_tokens <= 8, true);
const kinds = [];
let streamed = "";
for await (const event of await client.responses.create({ model: CHAT, input: messages, max_output_tokens: 8, stream: true })) {
  kinds.push(event.type);
  if (event.type === "response.output_text.delta") streamed += event.delta;
  if (event.type === "response.output_text.done") assert.equal(event.text, streamed);
}
assert.equal(kinds[0], "response.created");
assert.match(kinds.at(-1), /^response\.(completed|incomplete)$/);
done.push("responses");

const once = { headers: { "Idempotency-Key": "node-1" } };
const first = await client.chat.completions.create(asked, once);
assert.deepEqual(await client.chat.completions.create(asked, once), first);
await refused(client.chat.completions.create({ ...asked, n: 2 }, once), 422, "idempotency_key_reused");

await refused(client.models.retrieve("nothing"), 404, "model_not_found", "model");
await refused(client.chat.completions.create({ ...asked, model: EMBED }), 400, "model_not_supported", "model");
await refused(client.chat.completions.create({ ...asked, temperature: 3 }), 400, "invalid_value", "temperature");
await refused(client.chat.completions.create({ ...asked, whatever: 1 }), 400, "unknown_parameter", "whatever");
await refused(client.chat.completions.create({ ...asked, tools: [{ type: "function", function: { name: "f" } }] }), 400, "unsupported_parameter", "tools");
await refused(client.chat.completions.create({ ...asked, response_format: { type: "json_object" } }), 400, "unsupported_value", "response_format.type");
const image = [{ role: "user", content: [{ type: "image_url", image_url: { url: "data:" } }] }];
await refused(client.chat.completions.create({ ...asked, messages: image }), 400, "unsupported_value", "messages[0].content[0].type");
await refused(client.embeddings.create({ model: EMBED, input: "x", dimensions: 8 }), 400, "unsupported_parameter", "dimensions");
await refused(client.responses.create({ model: CHAT, input: "x", store: true }), 400, "unsupported_parameter", "store");
await refused(new OpenAI({ apiKey: "gm-wrong", maxRetries: 0 }).models.list(), 401, "invalid_api_key");

console.log(JSON.stringify(done));
