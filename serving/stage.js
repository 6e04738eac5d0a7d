"use strict";
// The page holds the play: its scene, its messages, its settings. The server is sent all of it and streams what
// follows, so to retry, to edit and to branch are all the same: a new version of the play, with other messages.
// Text of scenes, models and files is only ever set as textContent.

const $ = (id) => document.getElementById(id);
const DECISION = "NSP", WORLD = "Environment", END = "<END CHAT>", COLOURS = 6;
const offered = [];  // plays to choose from: {scene, messages, settings}
let versions = [];   // of one play: {scene, messages, settings, human, options, seed, stats, asked, over}
let stream = null;   // the AbortController of the request in progress
let edited = null;   // {index, from} of the message that is being changed, and the button that said so

const now = () => versions[$("version").value];
const tell = (text) => { $("status").textContent = text; };
const chosen = () => offered[$("scene").value];
const turns = (messages) => messages.filter((message) => message.role === DECISION).length;
const isOver = (message) => message?.role === DECISION && message.content === END;

function make(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

async function post(path, value, signal) {
  const reply = await fetch(path, { method: "POST", body: JSON.stringify(value), signal });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  return reply;
}

// ---- the script

function spans(text) { // as data/brackets.py: [thoughts], (actions), speech
  const found = [];
  let thoughts = 0, actions = 0;
  for (const part of text.split(/([[\]()])/)) {
    thoughts += part === "[";
    actions += part === "(" && !thoughts;
    const kind = thoughts ? "thought" : actions ? "action" : "speech";
    if (found.at(-1)?.className !== kind) found.push(make("span", kind));
    found.at(-1).textContent += part;
    thoughts -= part === "]" && thoughts > 0;
    actions -= part === ")" && actions > 0 && !thoughts;
  }
  return found;
}

function fill(line, name, text) {
  const place = now().scene.speaking_characters.filter((other) => other !== WORLD).indexOf(name);
  line.className = `line ${place < 0 ? "world" : `c${place % COLOURS}`} ${name === now().human ? "own" : ""}`;
  line.replaceChildren(make("b", "name", name), " ", ...spans(text));
}

function addLine(message, index) {
  if (message.role === DECISION) return;
  const item = make("li"), line = make("p"), tools = make("details", "tools"), summary = make("summary", "", "\u22ef");
  const before = now().messages.slice(0, index);
  const acts = {
    Retry: () => branch(before), Edit: () => edit(index, summary), "Go on from here": () => branch([...before, message]),
  };
  fill(line, message.role, message.content);
  summary.setAttribute("aria-label", `Change this line of ${message.role}`);
  const menu = make("div", "menu");
  menu.append(...Object.entries(acts).map(([text, act]) => {
    const button = make("button", "", text);
    button.addEventListener("click", () => { tools.open = false; act(); });
    return button;
  }));
  tools.name = "tools"; // one open at a time
  tools.append(summary, menu);
  item.append(line, tools);
  $("script").append(item);
}

function show() {
  $("title").textContent = now().scene.book;
  $("scenario").textContent = now().scene.scenario;
  $("script").replaceChildren();
  now().messages.forEach(addLine);
  $("verdict").hidden = true;
  edited = null;
  update();
}

function update() {
  const play = now(), asked = !stream && play.asked, changed = play.messages[edited?.index];
  $("go").textContent = stream ? "Stop" : "Go on";
  $("go").hidden = !stream && Boolean(play.over || asked || changed);
  $("curtain").hidden = !play.over;
  $("judge").disabled = $("save").disabled = Boolean(stream) || !play.messages.length;
  $("versions").hidden = versions.length < 2;
  $("say").hidden = !asked && !changed;
  $("cancel").hidden = !changed;
  $("line-label").textContent = changed ? `The line of ${changed.role}` : `Your line as ${asked}`;
  $("speaking").hidden = !stream;
}

// ---- playing

function start(play) { // one more version of the play; the others are kept
  stop();
  versions.push({ ...play, asked: null, over: isOver(play.messages.at(-1)), stats: {} });
  $("version").replaceChildren(...versions.map((_, i) => new Option(`${i + 1} of ${versions.length}`, i)));
  $("version").value = versions.length - 1;
  show();
}

function begin() {
  const { scene, messages, settings } = chosen(), human = $("human").value || null, seed = settings.seed ?? 0;
  const options = { model: $("model").value, temperature: Number($("temperature").value), seed };
  versions = [];
  $("choose").hidden = true;
  $("play").hidden = $("controls").hidden = false;
  $("thoughts").checked = human === null;
  $("thoughts").dispatchEvent(new Event("change"));
  const seeds = messages.map((message) => message.seed ?? 0); // those of retried messages
  start({ scene, messages, settings, human, options, seed: Math.max(seed, ...seeds) });
  $("title").focus();
  if (messages.length) tell("The play so far; go on whenever you like."); else goOn();
}

function branch(messages) {
  start({ ...now(), messages, seed: versions.at(-1).seed + 1 }); // one that no version has had
  goOn();
  $("go").focus();
}

function edit(index, from) {
  stop();
  edited = { index, from };
  tell("");
  update();
  $("line").value = now().messages[index].content;
  $("line").focus();
}

function stop() {
  stream?.abort();
  stream = null;
}

async function goOn(line = null) {
  const play = now(), control = stream = new AbortController(), { scene, messages, human, seed } = play;
  const settings = { ...play.options, max_rounds: turns(messages) + Number($("rounds").value) };
  play.asked = null;
  $("verdict").hidden = true;
  $("speaking").replaceChildren();
  tell("");
  update();
  try {
    const reply = await post("stage/next", { scene, messages, human, settings, seed, line }, control.signal);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = "", part; !(part = await reader.read()).done;) {
      const events = (text + part.value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        if (stream === control) stayAtEnd(() => follow(play, JSON.parse(event.slice("data: ".length))));
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
  }
  if (stream !== control) return;
  stream = null;
  const lost = document.activeElement === $("go");
  update();
  if (play.asked) $("line").focus();
  else if (lost && $("go").hidden) $("judge").focus();
}

function stayAtEnd(change) { // changes the page; whoever was at its end still is
  const page = document.documentElement, atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 100;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function follow(play, event) { // one event of the server's stream
  if (event.settings) play.settings = event.settings;
  if (event.text) fill($("speaking"), event.name, event.text);
  if (event.message) {
    play.messages = [...play.messages, event.message];
    addLine(event.message, play.messages.length - 1);
    $("speaking").replaceChildren();
    if (event.message.role !== DECISION) $("spoken").textContent = $("script").lastChild.firstChild.innerText;
  }
  if (!event.stats) return;
  for (const [name, count] of Object.entries(event.stats)) play.stats[name] = (play.stats[name] ?? 0) + count;
  play.asked = event.asked;
  const paused = turns(play.messages) + 1 >= play.settings.max_rounds && !isOver(play.messages.at(-1));
  play.over = !event.error && !event.asked && !paused;
  if (event.error) tell(event.error);
  else if (paused && !event.asked) tell(`A pause after ${turns(play.messages) + 1} turns.`);
}

// ---- what can be played

function offer(plays, heading = "") {
  const groups = Object.create(null), first = offered.length; // a book may be called "constructor"
  for (const play of plays) {
    const { book, topic, scenario } = play.scene;
    groups[book] ??= Object.assign(make("optgroup"), { label: heading + book });
    const number = groups[book].children.length + 1;
    groups[book].append(new Option(`${number}. ${topic || scenario.slice(0, 60)}`, offered.push(play) - 1));
  }
  $("scene").append(...Object.values(groups));
  $("scene").value = first;
  choose();
}

function choose() {
  const { scene, settings } = chosen(), cast = scene.speaking_characters, profiles = new Map(Object.entries(scene.profiles));
  $("programme-title").textContent = scene.book;
  $("programme-scenario").textContent = scene.scenario;
  $("programme-cast").replaceChildren(...cast.filter((name) => name !== WORLD).map((name) => {
    const about = make("details");
    about.append(make("summary", "name", name), make("p", "", profiles.get(name) ?? ""));
    return about;
  }));
  $("human").replaceChildren(new Option("Nobody, I watch", ""), ...cast.map((name) => new Option(name)));
  $("human").value = settings.human ?? "";
}

function addCharacter() {
  const set = make("fieldset"), fields = { Name: "input", "Who they are": "textarea", "What they want": "textarea" };
  set.append(make("legend", "", `Character ${$("own-cast").children.length + 1}`));
  set.append(...Object.entries(fields).map(([text, tag]) => {
    const label = make("label", "field", text);
    label.append(make(tag));
    return label;
  }));
  $("own-cast").append(set);
  return set.querySelector("input");
}

function useOwn() {
  const values = (set) => [...set.querySelectorAll("input, textarea")].map((field) => field.value.trim());
  const cast = [...$("own-cast").children].map(values).filter(([name]) => name), names = cast.map(([name]) => name);
  if (!names.length || new Set(names).size < names.length) return tell("Every character needs a name of its own.");
  const column = (i) => Object.fromEntries(cast.map((row) => [row[0], row[i]]));
  const scene = {
    book: $("own-title").value.trim() || "Untitled", i_p: 0, i_c: 0, tag: "ood", scenario: $("own-scenario").value.trim(),
    topic: "", plot_summary: "", dialogues: [], speaking_characters: [...new Set([...names, WORLD])],
    major_characters: names, profiles: column(1), motivations: column(2),
  };
  tell("");
  offer([{ scene, messages: [], settings: {} }]);
  $("programme-title").focus();
}

function encoded(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done({ name: file.name, data: reader.result.split(",")[1] ?? "" });
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
}

async function open(list) {
  if (!list.length) return;
  try {
    const files = await Promise.all([...list].map(encoded)), names = files.map((file) => file.name).join(", ");
    const { plays } = await (await post("stage/open", { files })).json();
    if ($("choose").hidden) leave();
    offer(plays, `${names}: `);
    tell(`Opened ${names}.`);
    $("programme-title").focus();
  } catch (error) {
    tell(error.message);
  }
  $("file").value = ""; // so that the same file can be chosen again
}

// ---- at the end

function row(name, value) {
  const line = make("tr"), head = Object.assign(make("th", "", name), { scope: "row" });
  line.append(head, make("td", "", value));
  return line;
}

async function judge() {
  const play = now(), { scene, messages, settings } = play;
  const number = (value, factor = 1) => value === null ? "none" : (factor * value).toFixed(1);
  tell("Judging ...");
  $("judge").disabled = true;
  try {
    const found = await (await post("stage/judge", { scene, messages, settings })).json();
    const verdicts = Object.entries(found.dimensions);
    if (stream || play !== now() || play.messages !== messages || $("play").hidden) return; // it has gone on
    const rows = Object.entries(found.metrics).map(([name, value]) => row(name, number(value, 100)));
    rows.push(...verdicts.map(([name, verdict]) => row(name, number(verdict.score))));
    if (found.judge) rows.push(row(`Score by ${found.judge}`, number(found.score)));
    $("scores").replaceChildren(...rows);
    $("flaws").replaceChildren(...verdicts.flatMap(([name, { flaws }]) =>
      flaws.map((flaw) => make("li", "", `${name}, ${flaw.type} (${flaw.severity}): ${flaw.instance}`))));
    $("verdict").hidden = false;
    $("verdict-title").focus();
    $("verdict").scrollIntoView();
    tell(rows.length ? "" : "Nothing to compare with: the scene has no original, and the server no judge.");
  } catch (error) {
    tell(error.message);
  }
  update();
}

function save() { // a line of transcripts.jsonl
  const { scene, messages, settings, stats } = now(), { book, i_p, i_c } = scene;
  const line = JSON.stringify({ book, i_p, i_c, scene, settings, messages, stats }) + "\n";
  const href = URL.createObjectURL(new Blob([line], { type: "application/jsonl" }));
  Object.assign(make("a"), { href, download: "transcripts.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
  tell("Saved as transcripts.jsonl.");
}

function leave() { // the play stays among those to choose from
  stop();
  if (now().messages.length) offer([now()], "Left: ");
  $("play").hidden = $("controls").hidden = $("say").hidden = true;
  $("choose").hidden = false;
  tell("");
  $("scene").focus();
}

// ---- the keyboard and the mouse

function on(id, kind, act) {
  $(id).addEventListener(kind, (event) => {
    if (kind === "submit") event.preventDefault();
    act(event);
  });
}

on("scene", "change", choose);
on("file", "change", () => open($("file").files));
on("own-add", "click", () => addCharacter().focus());
on("own-form", "submit", useOwn);
on("setup", "submit", begin);
$("setup").addEventListener("invalid", (event) => { event.target.closest("details").open = true; }, true);
on("say", "submit", () => {
  const text = $("line").value.trim(), { messages } = now();
  $("line").value = "";
  if (!edited) {
    goOn(text);
    return $("go").focus();
  }
  const { role, content } = messages[edited.index];
  branch([...messages.slice(0, edited.index), { role, content: text || content, human: true }]);
});
on("line", "keydown", (event) => {
  if (event.key === "Escape" && edited) $("cancel").click();
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("say").requestSubmit();
});
on("cancel", "click", () => {
  edited.from.focus();
  edited = null;
  $("line").value = "";
  update();
});
on("go", "click", () => { if (!stream) return goOn(); stop(); update(); tell("Stopped."); });
on("version", "change", () => { stop(); show(); });
on("thoughts", "change", () => document.body.classList.toggle("no-thoughts", !$("thoughts").checked));
on("judge", "click", judge);
on("save", "click", save);
on("leave", "click", leave);
document.addEventListener("keydown", (event) => {
  const tools = document.querySelector(".tools[open]");
  if (event.key !== "Escape" || !tools) return;
  tools.open = false;
  tools.firstChild.focus();
});
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => {
  if (!event.dataTransfer.types.includes("Files")) return; // text is dropped into a field as ever
  event.preventDefault();
  if (kind === "drop") open(event.dataTransfer.files);
});
new ResizeObserver(() => stayAtEnd(() => {
  document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`);
})).observe($("bar"));

addCharacter();
addCharacter();
fetch("stage/scenes").then((reply) => reply.json()).then(({ plays, models }) => {
  $("model").replaceChildren(...models.map((name) => new Option(name)));
  offer(plays);
}).catch((error) => tell(error.message));
