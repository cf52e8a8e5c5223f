// OpenAI's SDK for Node: `node drive_openai.mjs BASE_URL`, run in its own environment. An assertion that fails is its exit code.
import assert from "node:assert/strict";
import OpenAI from "openai";

const baseURL = process.argv[2];
const model = "mock";
const messages = [{ role: "user", content: "hello" }];
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Rome", "Oslo"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const create = (fields, options) => client.chat.completions.create({ model, messages, ...fields }, options);

async function textOf(stream) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
  return text;
}

const checks = {
  async chat() {
    const answer = await create({ max_completion_tokens: 8 });
    assert.ok(answer.choices[0].message.content);
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 8);
    assert.ok(answer.usage.prompt_tokens_details.cached_tokens >= 0);
  },
  async stream() {
    const same = { temperature: 0, max_tokens: 20 };
    const whole = (await create(same)).choices[0].message.content;
    assert.equal(await textOf(await create({ ...same, stream: true })), whole);
    const gathered = client.chat.completions.stream({ model, messages, ...same });
    assert.equal(await gathered.finalContent(), whole);
  },
  async n() {
    const answer = await create({ n: 3, max_tokens: 4 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
  },
  async logprobs() {
    const { content } = (await create({ logprobs: true, top_logprobs: 2, max_tokens: 3 })).choices[0].logprobs;
    assert.equal(content.length, 3);
    assert.ok(content.every((entry) => entry.top_logprobs.length === 2));
  },
  async stop() {
    const same = { temperature: 0, max_tokens: 20 };
    const whole = (await create(same)).choices[0].message.content;
    const word = whole.trim().split(" ")[3];
    const cut = (await create({ ...same, stop: [word] })).choices[0];
    assert.equal(cut.finish_reason, "stop");
    assert.equal(cut.message.content, whole.slice(0, whole.indexOf(word)));
  },
  async seed() {
    const texts = [];
    for (const seed of [7, 7]) texts.push((await create({ seed, temperature: 1, max_tokens: 8 })).choices[0].message.content);
    assert.equal(texts[0], texts[1]);
  },
  async responses() {
    const same = { model, input: "hello", temperature: 0, max_output_tokens: 8 };
    const whole = await client.responses.create(same);
    assert.ok(whole.output_text);
    let text = "";
    for await (const event of await client.responses.create({ ...same, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, whole.output_text);
  },
  async models() {
    const names = [];
    for await (const one of client.models.list()) names.push(one.id);
    assert.deepEqual(names, [model]);
  },
  async errors() {
    await assert.rejects(create({ top_p: 7 }), (error) => error instanceof OpenAI.BadRequestError && error.param === "top_p");
    await assert.rejects(create({ model: "other" }), OpenAI.NotFoundError);
  },
  async tools() {
    const same = { tools: [weather], tool_choice: "required", temperature: 0, max_tokens: 2000 };
    const { message, finish_reason } = (await create({ ...same, parallel_tool_calls: false })).choices[0];
    assert.equal(finish_reason, "tool_calls");
    assert.equal(message.tool_calls.length, 1);
    assert.ok(["Rome", "Oslo"].includes(JSON.parse(message.tool_calls[0].function.arguments).city));
    const whole = (await create(same)).choices[0].message.tool_calls.map((call) => call.function);
    const gathered = await client.chat.completions.stream({ model, messages, ...same }).finalMessage();
    assert.deepEqual(gathered.tool_calls.map(({ function: { name, arguments: text } }) => ({ name, arguments: text })), whole);
    const named = await create({ ...same, tool_choice: { type: "function", function: { name: "weather" } } });
    assert.equal(named.choices[0].finish_reason, "stop");
    assert.equal(named.choices[0].message.tool_calls[0].function.name, "weather");
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "fine" };
    const after = await create({ messages: [...messages, message, result], tools: [weather], max_tokens: 6 });
    assert.ok(after.choices[0].message.content);
  },
  async timeout() {
    await assert.rejects(create({ max_tokens: 4000, ignore_eos: true }, { timeout: 500 }), OpenAI.APIConnectionTimeoutError);
  },
  async cancel_by_closing() {
    const stream = await create({ max_tokens: 4000, ignore_eos: true, stream: true });
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) break; // leaving the loop aborts the request
    }
    const stopped = new AbortController();
    const whole = create({ max_tokens: 4000, ignore_eos: true }, { signal: stopped.signal });
    setTimeout(() => stopped.abort(), 200);
    await assert.rejects(whole, OpenAI.APIUserAbortError);
  },
  async retry_on_429() {
    const patient = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 20 });
    const fields = { model, messages, max_tokens: 30, ignore_eos: true };
    const answers = await Promise.all(Array.from({ length: 24 }, () => patient.chat.completions.create(fields)));
    assert.ok(answers.every((answer) => answer.usage.completion_tokens === 30));
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}
