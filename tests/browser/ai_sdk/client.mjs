// A page with `useChat`, without the page: the AI SDK's own chat and transport, which `useChat` is made of.
//
// Usage: node client.mjs <folder of node_modules> <address> <chat> send <text> | resume | regenerate
// It begins with the stored messages, as a page does. Each line of its output is the state of the chat after a change.

import { createRequire } from "node:module";

const [folder, address, id, verb, text] = process.argv.slice(2);
const { AbstractChat, DefaultChatTransport } = createRequire(`${folder}/`)("ai");

class Chat extends AbstractChat {
  constructor(messages) {
    const state = { status: "ready", error: undefined, messages, snapshot: structuredClone };
    state.pushMessage = (message) => state.messages.push(structuredClone(message));
    state.popMessage = () => state.messages.pop();
    state.replaceMessage = (index, message) => (state.messages[index] = structuredClone(message));
    const shown = new Proxy(state, {
      get: (_, name) => (typeof state[name] === "function" && name !== "snapshot" ? (...given) => (state[name](...given), tell(state)) : state[name]),
      set: (_, name, value) => ((state[name] = value), tell(state), true),
    });
    super({ id, state: shown, transport: new DefaultChatTransport({ api: new URL("api/chat", address).href }) });
  }
}

function tell({ status, error, messages }) {
  console.log(JSON.stringify({ status, error: error?.message ?? null, messages }));
}

function messageOf({ id, role, content, parts }) {
  return { id, role, parts: parts ?? [{ type: "text", text: content }] };
}

const stored = await fetch(new URL(`api/sessions/${id}`, address));
const messages = stored.ok ? (await stored.json()).messages.map(messageOf) : [];
const chat = new Chat(messages);
if (verb === "send") await chat.sendMessage({ text });
if (verb === "resume") await chat.resumeStream();
if (verb === "regenerate") await chat.regenerate();
tell(chat);
