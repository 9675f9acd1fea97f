// The chat page. The server has all truth, and this page shows it.
//
// One loop asks for the list of chats every few seconds. It reads the open chat again if its row has changed, or if the
// connection of its stream broke. While an answer is written, the page follows the stream's events from its cursor,
// which is the id of the last event that it has shown. So it shows no word twice and misses none, from any worker.

import { Answer, element, messageNode, noteNode, noteOf, showEnd } from "./messages.js";

const PAGE = 50; // messages, or chats, of one request
const POLL_MS = 3000, SOON_MS = 700, LONGEST_MS = 10_000, DRAW_MS = 30;
const NEAR_PX = 80;
const MOST_DOUBTS = 2;

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt"), scroll = byId("scroll"), log = byId("log");

// The chats that are shown, newest first. `newId` is an id that the server lets this user's next chat have.
const list = { rows: [], cursor: null, isRead: false, newId: null };
let chat = null; // the open chat, see open()
let live = null; // the answer that is being written, see begin()
let draft = {}; // {text, tried}: what stands in the box, and the message that was last tried to be sent
let isAtEnd = true; // whether the reader is at the end of the log
let failures = 0; // requests of the loop that failed, one after another

// --- the server ------------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, error) {
    super(error.message ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: error.code });
  }
}

async function call(method, path, body) {
  const headers = body && { "Content-Type": "application/json" };
  const signal = AbortSignal.timeout(20_000);
  const response = await fetch(`api/sessions${path}`, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response.status === 204 ? null : response.json();
  const answer = await response.json().catch(() => ({}));
  throw new Refused(response.status, answer.error ?? {});
}

const ofChat = (path = "") => `/${chat.id}${path}`;

// crypto.randomUUID exists only on https and on localhost.
function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// A tab remembers its drafts. A browser that refuses storage to the page forgets them.
function remember(key, value) {
  try {
    value === null ? sessionStorage.removeItem(key) : sessionStorage.setItem(key, JSON.stringify(value));
  } catch {}
}

function recall(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key));
  } catch {
    return null;
  }
}

// --- the loop --------------------------------------------------------------------------------------------------------

let timer, ticking = null;

function tick() {
  ticking ??= look().finally(() => (ticking = null));
  return ticking;
}

async function look() {
  clearTimeout(timer);
  if (!document.hidden) {
    try {
      await Promise.all([readList(), chat.isStale && readChat()]);
      if (chat.isStale) await readChat(); // its row has changed
      failures = 0;
      say("connection", "");
    } catch (error) {
      failures += 1;
      say("connection", error instanceof Refused ? error.message : "The connection is lost. Trying again…");
    }
  }
  // Not all tabs come back at once to a server that was away.
  later(failures ? Math.min(SOON_MS * 2 ** failures, LONGEST_MS) * (0.75 + Math.random() / 2) : POLL_MS);
}

function later(wait_ms) {
  clearTimeout(timer);
  timer = setTimeout(tick, wait_ms);
}

// A hidden tab follows nothing, because a browser has only six connections for all tabs of a server. A connection may
// also have died while the computer slept, and nothing tells so. So a tab that is seen again reads what it missed.
function wake() {
  live?.source.close();
  if (document.hidden) return;
  chat.isStale = !chat.isNew;
  later(0);
}

function say(where, text) {
  if (byId(where).textContent !== text) byId(where).textContent = text;
}

// --- the list of chats -----------------------------------------------------------------------------------------------

async function readList() {
  const page = await call("GET", `?limit=${PAGE}`);
  const before = rowOf(chat.id);
  const oldest = page.sessions.at(-1);
  const known = new Set(page.sessions.map((row) => row.id));
  const isOlder = (row) => !known.has(row.id) && (!oldest || row.updated_at <= oldest.updated_at);
  const rest = page.cursor ? list.rows.filter(isOlder) : [];
  list.rows = [...page.sessions, ...rest];
  if (!rest.length) list.cursor = page.cursor;
  const row = rowOf(chat.id);
  if (row) chat.title = row.title ?? "";
  if (live) doubt(page);
  if (list.isRead && !chat.isNew && !live && JSON.stringify(row) !== JSON.stringify(before)) chat.isStale = true;
  list.isRead = true;
  list.newId = page.new_id ?? null;
  renderTitle();
  renderList();
}

// A connection may die in silence, and then nobody tells the end of the answer. One page of the list may be older than
// the answer, so that it takes two of them. A row that stands further down in the list tells nothing.
function doubt({ sessions, cursor }) {
  const row = sessions.find(({ id }) => id === chat.id);
  const isOver = row ? row.stream_id !== live.id : !cursor;
  live.doubts = isOver ? live.doubts + 1 : 0;
  if (live.doubts < MOST_DOUBTS) return;
  live.doubts = 0;
  live.source.close();
  chat.isStale = true;
}

async function readMoreOfList() {
  const page = await call("GET", `?limit=${PAGE}&before=${encodeURIComponent(list.cursor)}`);
  const known = new Set(list.rows.map((row) => row.id));
  list.rows.push(...page.sessions.filter((row) => !known.has(row.id)));
  list.cursor = page.cursor;
  renderList();
}

const rowOf = (id) => list.rows.find((row) => row.id === id);
const items = new Map(); // by the id of the chat: {key, node}

function renderList() {
  const nodes = list.rows.map((row) => cached(items, row.id, [row, row.id === chat.id], () => rowNode(row)));
  place(byId("sessions"), nodes);
  byId("no-sessions").hidden = list.rows.length > 0;
  byId("more-sessions").hidden = !list.cursor;
}

function rowNode(row) {
  const link = element("a", { href: `#${row.id}` }, element("span", { className: "name", textContent: row.title || "Untitled chat" }));
  if (row.id === chat.id) link.setAttribute("aria-current", "page");
  if (row.live) link.append(element("span", { className: "live", role: "img", ariaLabel: "An answer is being written", title: "An answer is being written" }));
  else link.append(element("time", { dateTime: row.updated_at, textContent: when(row.updated_at) }));
  return element("li", {}, link);
}

function when(text) {
  const time = new Date(text), now = new Date();
  if (time.toDateString() === now.toDateString()) return time.toLocaleTimeString([], { hour: "numeric", minute: "2-digit" });
  return time.toLocaleDateString([], { day: "numeric", month: "short", year: time.getFullYear() === now.getFullYear() ? undefined : "numeric" });
}

// Returns the node that was made for this key, or makes it again if what it shows has changed.
function cached(nodes, id, shown, make) {
  const key = JSON.stringify(shown);
  if (nodes.get(id)?.key !== key) nodes.set(id, { key, node: make() });
  return nodes.get(id).node;
}

// Gives an element these children, and leaves alone those that stand where they should.
function place(parent, nodes) {
  nodes.forEach((node, index) => parent.children[index] === node || parent.insertBefore(node, parent.children[index] ?? null));
  while (parent.children.length > nodes.length) parent.lastElementChild.remove();
}

// --- the open chat ---------------------------------------------------------------------------------------------------

function open() {
  const named = location.hash.slice(1);
  const isNew = !/^(?!\.{1,2}$)[A-Za-z0-9_.:-]{1,128}$/.test(named);
  const id = isNew ? recall("persist.new") : named; // a new chat has none before its first message
  byId("title").blur(); // so that a title that was typed goes to its own chat
  byId("confirm").close("keep");
  live?.source.close();
  live = null;
  chat = { id, isNew, isStale: !isNew, isGone: false, title: "", messages: [], first: 0 };
  articles.clear();
  isAtEnd = true;
  log.ariaLive = "off"; // until an answer is written, because a screen reader would read out the whole chat
  draft = recall(draftKey()) ?? { text: "" };
  prompt.value = draft.text;
  say("notice", "");
  showDrawer(false);
  render();
  renderList();
  fitPrompt();
  // On a touch screen this would bring up the keyboard.
  if (matchMedia("(hover: hover)").matches) prompt.focus();
  later(0);
}

async function readChat() {
  const asked = chat;
  asked.isStale = false;
  try {
    const answer = await call("GET", ofChat(`?limit=${PAGE}`));
    if (asked === chat) show(answer);
  } catch (error) {
    if (error.status !== 404) asked.isStale = true;
    if (error.status !== 404) throw error;
    if (asked === chat) showGone();
  }
}

function show({ title, messages, first, stream }) {
  // Earlier messages that were loaded stay, unless so many came that there is a gap behind them.
  const kept = first > chat.first + chat.messages.length ? [] : chat.messages.slice(0, Math.max(0, first - chat.first));
  Object.assign(chat, { isGone: false, title: title ?? "", messages: [...kept, ...messages], first: first - kept.length });
  if (draft.tried && messages.some((message) => message.id === draft.tried.id)) clearDraft(draft.tried.content);
  // The server stores the answer of a stream under this id, and `after` is the last event that is in it.
  if (stream?.live) begin(stream.stream_id, stream.after, messages.find(({ id }) => id === `${stream.stream_id}.answer`));
  else if (live) {
    end();
    say("notice", "");
  }
  render();
}

function showGone() {
  end();
  Object.assign(chat, { isGone: true, title: "", messages: [], first: 0 });
  list.rows = list.rows.filter((row) => row.id !== chat.id);
  say("notice", "There is no chat here any more. A message would begin it anew.");
  render();
  renderList();
}

async function readOlder() {
  const asked = chat;
  const page = await call("GET", ofChat(`?limit=${PAGE}&before=${chat.first}`));
  if (asked !== chat || page.first >= chat.first) return;
  const below = scroll.scrollHeight - scroll.scrollTop;
  log.ariaLive = "off";
  chat.messages = [...page.messages.slice(0, chat.first - page.first), ...chat.messages];
  chat.first = page.first;
  render();
  scroll.scrollTop = scroll.scrollHeight - below;
}

const articles = new Map(); // by the id of the message: {key, node}

function render() {
  // The live answer begins with what is stored of it, so that part is not shown by itself.
  const shown = live && chat.messages.at(-1)?.partial ? chat.messages.slice(0, -1) : chat.messages;
  const last = live ? null : chat.messages.at(-1);
  staying(() => {
    const nodes = shown.map((message, place) => {
      const node = cached(articles, message.id, message, () => messageNode(message));
      showEnd(node, message, shown[place + 1], message === last ? retry : null);
      return node;
    });
    if (live) nodes.push(live.answer.node);
    const note = last && noteOf(last);
    if (note) nodes.push(cached(articles, "note", [note, last.id], () => noteNode(note, retry)));
    place(log, nodes);
  });
  byId("older").hidden = chat.first === 0;
  byId("welcome").hidden = log.children.length > 0;
  byId("delete").hidden = chat.isNew || chat.isGone;
  byId("stop").hidden = !live;
  renderTitle();
}

function renderTitle() {
  if (document.activeElement !== byId("title")) byId("title").value = chat.title;
  byId("title").disabled = chat.isNew || chat.isGone;
  byId("title").placeholder = chat.isNew ? "New chat" : "Untitled chat";
  document.title = chat.title || "Chats";
}

// Changes the log. A reader who is at its end stays at its end.
function staying(change) {
  change();
  if (isAtEnd) toEnd();
}

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
  noteScroll();
}

// Only a reader scrolls away from the end. A log that grows or a window that shrinks does not.
function noteScroll() {
  isAtEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_PX;
  byId("newest").hidden = isAtEnd;
}

// --- the answer that is being written --------------------------------------------------------------------------------

// Follows an answer from an event on. What the server has stored of it by then is shown first.
function begin(id, after, stored) {
  if (live?.id !== id) {
    end();
    live = { id, after, answer: new Answer(id, stored), parts: [], source: null, doubts: 0 };
  }
  if (!live.source || live.source.readyState === EventSource.CLOSED) follow();
}

function follow() {
  const path = ofChat(`/streams/${live.id}/events?after=${encodeURIComponent(live.after)}`);
  const source = (live.source = new EventSource(`api/sessions${path}`));
  const readAgain = (wait_ms) => {
    source.close();
    if (live?.source !== source) return;
    chat.isStale = true;
    later(wait_ms);
  };
  source.addEventListener("part", (event) => {
    live.after = event.lastEventId;
    live.parts.push(JSON.parse(event.data));
    drawing ??= setTimeout(draw, DRAW_MS);
  });
  source.addEventListener("end", () => readAgain(0));
  source.addEventListener("error", () => readAgain(SOON_MS));
  source.addEventListener("expired", () => {
    readAgain(SOON_MS);
    end(); // the stored message is shown instead
  });
}

// Many parts are drawn at once, because the browser lays out the whole text each time.
let drawing = null;

function draw() {
  drawing = null;
  if (!live) return;
  log.ariaLive = "polite";
  staying(() => live.parts.forEach((part) => live.answer.add(part)));
  live.parts = [];
}

function end() {
  live?.source.close();
  live = null;
}

// --- what the user does ----------------------------------------------------------------------------------------------

async function send() {
  const text = prompt.value.trim();
  if (!text || byId("composer").ariaBusy === "true") return;
  // A message that is tried again keeps its id, so that the server answers it once.
  draft.tried = draft.tried?.content === text ? draft.tried : { id: newId(), content: text };
  keepDraft();
  const message = draft.tried;
  await acting("/turns", { message }, whyNotSent, () => {
    clearDraft(text);
    if (chat.messages.some((known) => known.id === message.id)) return;
    // In the server's order of names, so that its article is not made again.
    chat.messages.push({ id: message.id, role: "user", content: text });
  });
}

// Gives a new chat an id that the server offers. A message that is tried again goes to the chat of its first try.
async function nameNew(asked) {
  if (!list.newId) await tick();
  asked.id = list.newId ?? newId();
  list.newId = null; // for one chat only
  remember("persist.new", asked.id);
}

// The server has taken the first message of a new chat.
function noteBegun(asked) {
  remember(draftKey(asked), null);
  remember("persist.new", null);
  asked.isNew = false;
  if (asked === chat) history.pushState(null, "", `#${chat.id}`);
}

async function retry() {
  // Another tab may have sent a message by now. Its answer stays.
  const message_id = chat.messages.findLast((message) => message.role === "user")?.id;
  await acting("/retry", { message_id }, whyNot, () => {
    while (chat.messages.length && chat.messages.at(-1).role !== "user") chat.messages.pop();
  });
}

// Starts a turn, and follows its answer.
async function acting(path, body, told, onStarted) {
  const asked = chat;
  say("notice", "");
  byId("composer").ariaBusy = "true";
  try {
    if (!asked.id) await nameNew(asked);
    if (asked !== chat) return;
    const turn = await call("POST", ofChat(path), body);
    if (asked.isNew) noteBegun(asked);
    if (asked !== chat) return;
    onStarted();
    isAtEnd = true;
    if (turn.repeated || !turn.stream_id) chat.isStale = true;
    else begin(turn.stream_id, "0");
    render();
  } catch (error) {
    const isNoChat = error.status === 404 && (asked.isNew || asked.isGone);
    if (isNoChat && asked.isNew) {
      asked.id = null; // the next try asks for another one
      remember("persist.new", null);
    }
    if (asked !== chat) return;
    say("notice", isNoChat ? "This server does not let you begin this chat. Your message stays here." : told(error));
    chat.isStale = error.code === "busy" || !(chat.isNew || isNoChat);
  } finally {
    byId("composer").ariaBusy = "false";
    later(0);
  }
}

function whyNot(error) {
  return error instanceof Refused ? error.message : "The server could not be reached. Try again.";
}

function whyNotSent(error) {
  if (error.code === "busy") return "Another answer was being written, so your message was not sent. It stays here.";
  if (error instanceof Refused) return `${error.message} Your message stays here.`;
  return "The server could not be reached. Your message stays here until you send it again.";
}

async function stop() {
  if (!live) return;
  byId("stop").disabled = true;
  await trying(call("POST", ofChat(`/streams/${live.id}/stop`)));
  byId("stop").disabled = false;
}

async function rename() {
  const title = byId("title").value.trim();
  if (chat.isNew || title === chat.title) return;
  chat.title = title;
  await trying(call("PATCH", ofChat(), { title }));
}

async function remove() {
  const asked = chat; // another one may be open at the end of the dialog
  say("confirm-text", `All messages of “${asked.title || "Untitled chat"}” are removed. This cannot be undone.`);
  byId("confirm").returnValue = "";
  byId("confirm").showModal();
  await new Promise((closed) => byId("confirm").addEventListener("close", closed, { once: true }));
  if (byId("confirm").returnValue !== "delete") return;
  if (await trying(call("DELETE", `/${asked.id}?force=1`))) {
    list.rows = list.rows.filter((row) => row.id !== asked.id);
    if (asked === chat) location.hash = "";
  }
}

async function trying(request) {
  try {
    await request;
    return true;
  } catch (error) {
    say("notice", whyNot(error));
    return false;
  } finally {
    later(0);
  }
}

const draftKey = (of = chat) => `persist.draft.${of.isNew ? "" : of.id}`;

function keepDraft() {
  draft.text = prompt.value;
  remember(draftKey(), draft.text ? draft : null);
}

function clearDraft(text) {
  if (prompt.value.trim() === text) prompt.value = "";
  delete draft.tried;
  keepDraft();
  fitPrompt();
}

function fitPrompt() {
  byId("send").disabled = !prompt.value.trim();
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function showDrawer(isOpen) {
  document.body.classList.toggle("drawer", isOpen);
  byId("menu").ariaExpanded = String(isOpen);
  byId("main").inert = isOpen;
}

function onKey(event) {
  if (event.key !== "Escape" || event.isComposing || byId("confirm").open) return;
  if (document.body.classList.contains("drawer")) {
    showDrawer(false);
    byId("menu").focus();
  } else if (event.target === byId("title")) {
    byId("title").value = chat.title;
    prompt.focus();
  } else {
    stop();
  }
}

// A button that loads more is pressed by the reader, or by scrolling near to it.
function pressWhenSeen(button, read, root) {
  const press = () => {
    if (button.disabled) return;
    button.disabled = true;
    trying(read()).finally(() => (button.disabled = false));
  };
  button.onclick = press;
  new IntersectionObserver(([entry]) => entry.isIntersecting && press(), { root, rootMargin: "200px" }).observe(button);
}

byId("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
prompt.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
prompt.oninput = () => {
  keepDraft();
  fitPrompt();
};
byId("stop").onclick = stop;
byId("delete").onclick = remove;
byId("title").onchange = rename;
byId("title").onkeydown = (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault(); // or the box, which has the focus then, gets a new line
  prompt.focus();
};
byId("skip").onclick = () => prompt.focus();
byId("new").onclick = () => {
  if (location.hash.length < 2) open(); // the link leads nowhere else
};
byId("menu").onclick = () => {
  showDrawer(true);
  byId("new").focus();
};
byId("backdrop").onclick = () => showDrawer(false);
byId("newest").onclick = toEnd;
scroll.onscroll = noteScroll;
new ResizeObserver(() => staying(() => {})).observe(scroll);
pressWhenSeen(byId("older"), readOlder, scroll);
pressWhenSeen(byId("more-sessions"), readMoreOfList, byId("sessions-scroll"));
matchMedia("(max-width: 760px)").onchange = () => showDrawer(false);
document.onkeydown = onKey;
document.onvisibilitychange = wake;
addEventListener("online", wake);
addEventListener("offline", () => live?.source.dispatchEvent(new Event("error")));
addEventListener("pageshow", (event) => event.persisted && wake());
addEventListener("hashchange", open);
open();
