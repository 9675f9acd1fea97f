// How messages look.
//
// Text of messages is set as text. The only HTML is `html` of a message or of a text part of it. The server makes it of
// Markdown without HTML, for whole messages.

const NAMES = { user: "You", assistant: "Assistant" };

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function button(label, onclick, className = "") {
  return element("button", { type: "button", className, textContent: label, onclick });
}

// A stored message. `showEnd` completes it.
export function messageNode(message) {
  const node = articleNode(message.role, message.id);
  const body = new Body(node);
  for (const part of partsOf(message)) body.add(part);
  if (isWhole(message)) node.append(element("div", { className: "actions" }, copyButton("Copy answer", textOf(message.content))));
  return node;
}

// With `retry` it is the last message: its answer can be asked for again, and a note tells how it ended. An earlier one
// has a mark instead. This changes the node in place, because a screen reader reads out again what is made again.
export function showEnd(node, message, next, retry) {
  const mark = retry ? "" : markOf(message, next);
  const shown = node.querySelector(":scope > .mark");
  if ((shown?.textContent ?? "") !== mark) {
    shown?.remove();
    if (mark) node.append(element("p", { className: "mark", textContent: mark }));
  }
  if (!isWhole(message)) return;
  const again = node.querySelector(":scope > .actions > .again");
  if (retry && !again) node.lastElementChild.append(button("Answer again", retry, "again quiet"));
  if (!retry) again?.remove();
}

function articleNode(role, id) {
  const node = element("article", { className: role, ariaLabel: NAMES[role] ?? role });
  node.dataset.id = id;
  return node;
}

const isWhole = (message) => message.role === "assistant" && !message.partial && !message.error;

function partsOf(message) {
  return message.parts ?? [{ type: "text", text: textOf(message.content), html: message.html }];
}

function textOf(content) {
  if (Array.isArray(content)) return content.map((part) => part.text ?? "").join("");
  return typeof content === "string" ? content : "";
}

// Tells how an earlier answer ended that is not whole. Returns "" if there is nothing to tell. The server does not tell
// why there is no answer: it was stopped before its first word, or the server ended.
function markOf(message, next) {
  if (message.role === "user" && next?.role === "user") return "No answer";
  if (message.role !== "assistant" || isWhole(message)) return "";
  if (message.error) return `Failed: ${message.error}`;
  return message.stopped ? "Stopped" : "Cut off: the server ended";
}

// Tells what became of a turn that has no whole answer. Returns null if it has one.
export function noteOf(message) {
  if (isWhole(message)) return null;
  if (message.role !== "assistant") return "The answer ended before its first word. Your message is kept.";
  const why = message.stopped ? "The answer was stopped." : "The server ended before the answer was whole.";
  return `${message.error ?? why} What was written until then is kept.`;
}

export function noteNode(text, retry) {
  return element("div", { className: "note" }, element("p", { textContent: text }), button("Try again", retry));
}

// An answer that is being written. It begins with the part of it that is stored already.
export class Answer {
  constructor(id, stored) {
    this.node = articleNode("assistant", id);
    this.node.classList.add("live", "waiting");
    this.node.ariaBusy = "true"; // a screen reader reads the whole answer, and not each word
    this.body = new Body(this.node);
    for (const part of stored ? partsOf(stored) : []) this.add(part);
  }

  add(part) {
    this.node.classList.remove("waiting");
    this.body.add(part);
  }
}

// The parts of an answer, one behind the other: those of a stream's events, or those of a stored message.
class Body {
  constructor(node) {
    this.node = node;
    this.tools = new Map();
  }

  add(part) {
    if (part.type === "text" && part.html) this.node.append(markdownNode(part.html));
    else if (part.type === "text") this.text(part, () => this.node);
    else if (part.type === "reasoning") this.text(part, () => this.fold("Thoughts"));
    else if (part.type === "error") this.node.append(element("p", { className: "failure", textContent: part.text }));
    else if (part.type === "tool-input") this.tool(part.id, part.name, part.input);
    else if (part.type === "tool-output") this.tool(part.id, "a tool", part.output);
    else if (part.toolCallId) this.storedTool(part);
    if (part.text === undefined || part.html) this.kind = null;
  }

  // Pieces of one kind make one text.
  text({ type, text }, parent) {
    if (this.kind !== type) {
      this.into = document.createTextNode("");
      parent().append(element("div", { className: "plain" }, this.into));
    }
    this.kind = type;
    this.into.appendData(text);
  }

  fold(summary) {
    const node = element("details", {}, element("summary", { textContent: summary }));
    this.node.append(node);
    return node;
  }

  tool(id, name, value) {
    if (!this.tools.has(id)) this.tools.set(id, this.fold(`Used ${name}`));
    const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
    this.tools.get(id).append(element("pre", { textContent: text }));
  }

  storedTool(part) {
    this.tool(part.toolCallId, part.type.replace("tool-", ""), part.input);
    if ("output" in part) this.tool(part.toolCallId, "", part.output);
  }
}

function markdownNode(html) {
  const node = element("div", { className: "markdown", innerHTML: html });
  for (const pre of node.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
    const frame = element("div", { className: "code" });
    pre.tabIndex = 0; // so that keys can scroll it
    pre.replaceWith(frame);
    frame.append(element("div", {}, element("span", { textContent: language }), copyButton("Copy", pre.textContent)), pre);
  }
  return node;
}

function copyButton(label, text) {
  const node = button(label, async () => {
    node.textContent = (await copy(text)) ? "Copied" : "Could not copy";
    setTimeout(() => (node.textContent = label), 1500);
  }, "quiet");
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // A browser gives no clipboard to a page on plain http.
    const box = element("textarea", { value: text });
    document.body.append(box);
    box.select();
    const isDone = document.execCommand("copy");
    box.remove();
    return isDone;
  }
}
