"use strict";
// The page holds the play: its scene, its messages, its settings. The server is sent all of them and streams what follows.
// Text from scenes, models and files is only ever set as textContent.

const $ = (id) => document.getElementById(id);
const DECISION = "NSP", WORLD = "Environment", COLOURS = 6;
let offered = [];   // plays to choose from: {scene, messages, settings}
let versions = [];  // of the play: {scene, messages, settings, human, options, limit, stats, asked, over}
let stream = null;  // the AbortController of the request in progress
let edited = null;  // the index of the message that is being changed

const now = () => versions[Number($("version").value)];
const tell = (text) => { $("status").textContent = text; };

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function choices(select, texts, value = 0) {
  select.replaceChildren(...texts.map((text, i) => new Option(text, i)));
  select.value = value;
}

async function post(path, body, signal) {
  const reply = await fetch(path, { method: "POST", body, signal });
  if (!reply.ok) throw new Error((await reply.json()).error);
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
    if (part && found.at(-1)?.className === kind) found.at(-1).textContent += part;
    else if (part) found.push(make("span", kind, part));
    thoughts -= part === "]" && thoughts > 0;
    actions -= part === ")" && actions > 0 && !thoughts;
  }
  return found;
}

function fill(line, name, text) {
  const cast = now().scene.speaking_characters.filter((other) => other !== WORLD);
  line.className = "line " + (name === WORLD ? "world" : "c" + cast.indexOf(name) % COLOURS);
  line.replaceChildren(make("b", "name", name), " ", ...spans(text));
}

function addLine(message, index) {
  if (message.role === DECISION) return;
  const item = make("li"), line = make("p"), tools = make("details", "tools");
  fill(line, message.role, message.content);
  const summary = make("summary", "", "\u22ef");
  summary.setAttribute("aria-label", `Change the line of ${message.role}`);
  const tool = (text, act) => {
    const button = make("button", "", text);
    button.addEventListener("click", act);
    return button;
  };
  const before = now().messages.slice(0, index);
  tools.append(summary, tool("Retry", () => branch(before)), tool("Edit", () => edit(index)),
    tool("Go on from here", () => branch([...before, message])));
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
  const play = now(), asked = !stream && play.asked, changed = edited === null ? null : play.messages[edited];
  $("go").textContent = stream ? "Stop" : "Go on";
  $("go").hidden = !stream && (play.over || !!asked);
  $("curtain").hidden = !play.over;
  $("judge").disabled = $("save").disabled = !!stream || !play.messages.length;
  $("version-label").hidden = versions.length < 2;
  $("say").hidden = !asked && !changed;
  $("cancel").hidden = !changed;
  $("say").querySelector("label").textContent = changed ? `The line of ${changed.role}` : `Your line as ${asked}`;
  $("speaking").hidden = !stream;
}

// ---- playing

function begin(chosen, options) {
  stop();
  const { scene, messages, settings } = chosen, cast = scene.speaking_characters;
  const human = cast[Number($("human").value)] ?? null;
  const seed = settings.seed ?? 0;
  versions = [{ scene, messages, settings, human, options: { ...options, seed }, limit: options.rounds, stats: {} }];
  choices($("version"), ["1 of 1"]);
  $("setup").hidden = true;
  $("play").hidden = $("controls").hidden = false;
  $("thoughts").checked = human === null;
  document.body.classList.toggle("no-thoughts", human !== null);
  show();
  $("title").focus();
  if (messages.length) tell("Opened. Go on whenever you like."); else goOn();
}

function branch(messages) { // the version before is kept, and can be chosen again
  stop();
  const play = now(), options = { ...play.options, seed: play.options.seed + 1 };
  versions.push({ ...play, messages, options, asked: null, over: false, stats: {} });
  choices($("version"), versions.map((_, i) => `${i + 1} of ${versions.length}`), versions.length - 1);
  show();
  goOn();
}

function edit(index) {
  stop();
  edited = index;
  update();
  $("line").value = now().messages[index].content;
  $("line").focus();
}

function stop() {
  stream?.abort();
  stream = null;
}

async function goOn(line = null) {
  const play = now(), control = stream = new AbortController();
  const { scene, messages, human } = play, { model, temperature, seed, rounds } = play.options;
  const settings = { model, temperature, seed, max_rounds: play.limit };
  play.asked = null;
  fill($("speaking"), "", "");
  tell("");
  update();
  try {
    const body = JSON.stringify({ scene, messages, human, settings, line });
    const reader = (await post("stage/next", body, control.signal)).body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = "", part; !(part = await reader.read()).done;) {
      const events = (text + part.value).split("\n\n");
      text = events.pop();
      for (const event of events) if (stream === control) follow(play, JSON.parse(event.slice(6)));
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
  }
  if (stream !== control) return;
  stream = null;
  update();
  if (play.asked) $("line").focus();
}

function follow(play, event) {
  if (event.settings) play.settings = event.settings;
  if (event.text) fill($("speaking"), event.name, event.text);
  if (event.message) {
    play.messages = [...play.messages, event.message];
    addLine(event.message, play.messages.length - 1);
    $("speaking").replaceChildren();
    if (event.message.role !== DECISION) $("spoken").textContent = $("script").lastChild.firstChild.innerText;
  }
  if (event.stats) {
    for (const [name, count] of Object.entries(event.stats)) play.stats[name] = (play.stats[name] ?? 0) + count;
    play.asked = event.asked;
    const turns = play.messages.filter((message) => message.role === DECISION).length + 1;
    if (event.error) tell(event.error);
    else if (event.asked) tell(`It is your turn, ${event.asked}.`);
    else if (turns >= play.limit && play.messages.at(-1)?.content !== "<END CHAT>") {
      play.limit = turns + play.options.rounds;
      tell(`A pause after ${turns} turns.`);
    } else play.over = true;
  }
}

// ---- what is offered

function offer(plays, heading = "") {
  if (!plays.length) return;
  const groups = {}, first = offered.length;
  for (const play of plays) {
    const { book, topic, scenario } = play.scene;
    groups[book] ??= make("optgroup");
    groups[book].label = heading + book;
    const number = groups[book].children.length + 1;
    groups[book].append(new Option(`${number}. ${topic || scenario.slice(0, 60)}`, offered.push(play) - 1));
  }
  $("scene").append(...Object.values(groups));
  $("scene").value = first;
  choose();
}

function choose() {
  const { scene, settings } = offered[Number($("scene").value)], cast = scene.speaking_characters;
  $("programme-title").textContent = scene.book;
  $("programme-scenario").textContent = scene.scenario;
  $("programme-cast").replaceChildren(...cast.filter((name) => name !== WORLD)
    .flatMap((name) => [make("dt", "name", name), make("dd", "", scene.profiles[name] ?? "")]));
  $("human").replaceChildren(new Option("nobody: I watch", -1), ...cast.map((name, i) => new Option(name, i)));
  $("human").value = cast.indexOf(settings.human ?? "");
}

function addCharacter(name = "", profile = "", motivation = "") {
  const set = make("fieldset"), number = $("own-cast").children.length + 1;
  set.append(make("legend", "", `Character ${number}`));
  for (const [label, value, tag] of [["Name", name, "input"], ["Who they are", profile, "textarea"], ["What they want", motivation, "textarea"]]) {
    const field = make("label", "field", label), input = make(tag);
    input.value = value;
    field.append(input);
    set.append(field);
  }
  $("own-cast").append(set);
  return set.querySelector("input");
}

function useOwn() {
  const cast = [...$("own-cast").children].map((set) => [...set.querySelectorAll("input, textarea")].map((field) => field.value.trim()));
  const named = cast.filter(([name]) => name), of = (i) => Object.fromEntries(named.map((row) => [row[0], row[i]]));
  if (!named.length) return tell("Name a character first.");
  const names = Object.keys(of(1));
  const scene = { book: $("own-title").value.trim() || "Untitled", i_p: 0, i_c: 0, tag: "ood", scenario: $("own-scenario").value.trim(),
    topic: "", plot_summary: "", dialogues: [], speaking_characters: [...names, WORLD], major_characters: names,
    profiles: of(1), motivations: of(2) };
  offer([{ scene, messages: [], settings: {} }], "Your own: ");
  $("programme-title").focus();
}

async function open(files) {
  for (const file of files) {
    try {
      const found = await (await post("stage/open", file)).json();
      if (stream || !$("play").hidden) leave();
      offer(found.plays, `${file.name}: `);
      tell(`Opened ${file.name}.`);
      $("programme-title").focus();
    } catch (error) {
      tell(`${file.name}: ${error.message}`);
    }
  }
}

// ---- at the end

async function judge() {
  const { scene, messages, settings } = now();
  tell("Judging ...");
  $("judge").disabled = true;
  try {
    const found = await (await post("stage/judge", JSON.stringify({ scene, messages, settings }))).json();
    const rows = Object.entries(found.metrics).map(([name, value]) => [`${name} against the original`, (100 * value).toFixed(2)]);
    for (const [name, { score }] of Object.entries(found.dimensions)) rows.push([name, score === null ? "no valid verdict" : score.toFixed(1)]);
    if (found.judge) rows.push([`Score by ${found.judge}`, found.score === null ? "none" : found.score.toFixed(1)]);
    if (!rows.length) rows.push(["Nothing to compare with: the scene has no original, and the server no judge", ""]);
    $("scores").replaceChildren(...rows.map(([name, value]) => {
      const row = make("tr"), head = make("th", "", name);
      head.scope = "row";
      row.append(head, make("td", "", value));
      return row;
    }));
    $("flaws").replaceChildren(...Object.entries(found.dimensions).flatMap(([name, { flaws }]) =>
      flaws.map((flaw) => make("li", "", `${name}, ${flaw.type} (${flaw.severity}): ${flaw.instance}`))));
    $("verdict").hidden = false;
    $("verdict-title").focus();
    tell("");
  } catch (error) {
    tell(error.message);
  }
  update();
}

function save() { // a line of transcripts.jsonl
  const { scene, messages, settings, stats } = now(), { book, i_p, i_c } = scene;
  const line = JSON.stringify({ book, i_p, i_c, scene, settings, messages, stats }) + "\n";
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([line], { type: "application/jsonl" }));
  link.download = "transcripts.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  tell("Saved as transcripts.jsonl.");
}

function leave() {
  stop();
  $("play").hidden = $("controls").hidden = true;
  $("setup").hidden = false;
  tell("");
  $("scene").focus();
}

// ---- the keyboard and the mouse

$("scene").addEventListener("change", choose);
$("file").addEventListener("change", () => open($("file").files));
$("own-add").addEventListener("click", () => addCharacter().focus());
$("own-use").addEventListener("click", useOwn);
$("setup").addEventListener("submit", (event) => {
  event.preventDefault();
  const model = $("model").selectedOptions[0].text;
  begin(offered[Number($("scene").value)], { model, temperature: Number($("temperature").value), rounds: Number($("rounds").value) });
});
$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("line").value.trim();
  $("line").value = "";
  if (edited === null) return goOn(text);
  const { messages } = now(), content = text || messages[edited].content;
  branch([...messages.slice(0, edited), { role: messages[edited].role, content, human: true }]);
});
$("line").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && edited !== null) $("cancel").click();
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("say").requestSubmit();
});
$("cancel").addEventListener("click", () => { edited = null; $("line").value = ""; update(); });
$("go").addEventListener("click", () => { if (!stream) return goOn(); stop(); update(); tell("Stopped."); });
$("version").addEventListener("change", () => { stop(); show(); });
$("thoughts").addEventListener("change", () => document.body.classList.toggle("no-thoughts", !$("thoughts").checked));
$("judge").addEventListener("click", judge);
$("save").addEventListener("click", save);
$("leave").addEventListener("click", leave);
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); open(event.dataTransfer.files); });

addCharacter();
addCharacter();
fetch("stage/scenes").then((reply) => reply.json()).then(({ plays, models }) => {
  choices($("model"), models);
  offer(plays);
});
