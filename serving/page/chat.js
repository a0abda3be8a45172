/** The chat. History is kept here only: a reload forgets it. */
import { ApiError, apiKey, events, request, setApiKey } from "./api.js";
import { copyButton, h, say } from "./dom.js";
import { Markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const [messages, composer, question, settings, form] = ["messages", "composer", "question", "settings", "settings-form"].map($);
const hasKeyboard = !matchMedia("(pointer: coarse)").matches; // on a touch screen the focus would raise one

const exchanges = []; // of a question and its answer, the latest last
let modelName; // undefined until the server has told it
let writing = null; // the AbortController of the answer that is being written

// ---- asking ---------------------------------------------------------------------------------------------------------

function send() {
  const text = question.value.trim();
  if (text === "" || writing) return;
  question.value = "";
  fitQuestion();
  const exchange = { question: text, answer: "", asked: h("article", { class: "asked", "aria-label": "You" }, text) };
  exchanges.push(exchange);
  $("empty").hidden = true;
  messages.append(exchange.asked);
  messages.scrollTop = messages.scrollHeight; // whoever sends wants to see
  answer(exchange);
}

/** What the model is to know: an exchange that failed without a word is left out. */
function conversation() {
  const system = form.elements.system.value.trim();
  const before = exchanges.slice(0, -1).filter((exchange) => exchange.answer !== "");
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...before.flatMap(({ question, answer }) => [
      { role: "user", content: question },
      { role: "assistant", content: answer },
    ]),
    { role: "user", content: exchanges.at(-1).question },
  ];
}

function body() {
  const names = ["temperature", "top_p", "max_tokens", "seed"];
  const given = names.map((name) => [name, form.elements[name].valueAsNumber]).filter(([, value]) => !Number.isNaN(value));
  const stream = { stream: true, stream_options: { include_usage: true } };
  return { model: modelName, messages: conversation(), ...Object.fromEntries(given), ...stream };
}

/** Streams the answer to the latest question. */
async function answer(exchange) {
  const view = answerView(exchange);
  exchange.view?.element.replaceWith(view.element);
  if (!exchange.view) keepingTheEnd(() => messages.append(view.element));
  exchange.view = view;
  exchange.answer = "";
  for (const each of exchanges) each.view.again.hidden = each !== exchange; // only the latest can be had again
  const controller = new AbortController();
  setWriting(controller);
  const facts = { numChunks: 0 };
  try {
    for await (const data of stream(controller.signal, facts)) {
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      facts.usage = chunk.usage ?? facts.usage;
      const [choice] = chunk.choices ?? [];
      facts.reason = choice?.finish_reason ?? facts.reason;
      if (!choice?.delta?.content) continue;
      facts.last = performance.now();
      facts.first ??= facts.last;
      facts.numChunks += 1;
      exchange.answer += choice.delta.content;
      view.later();
    }
    announce("Answer complete");
  } catch (error) {
    if (controller.signal.aborted) facts.reason = "stopped";
    else view.fail(error instanceof ApiError ? error.message : `The answer broke off: ${error.message}`);
    announce(controller.signal.aborted ? "Stopped" : "");
  }
  view.end(facts);
  if (writing === controller) setWriting(null);
}

/** The events of one answer up to [DONE]; says in `facts` when it was asked for. */
async function* stream(signal, facts) {
  const response = await withKey(() => {
    facts.asked = performance.now();
    return request("v1/chat/completions", { body: body(), signal });
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    yield data;
  }
  throw new ApiError("The connection ended before the answer did");
}

function setWriting(controller) {
  const hadFocus = document.activeElement === $("send") || document.activeElement === $("stop");
  writing = controller;
  $("send").hidden = writing !== null;
  $("stop").hidden = writing === null;
  $("clear").disabled = exchanges.length === 0;
  if (hadFocus && hasKeyboard) question.focus(); // a hidden button cannot keep it
  if (writing) announce("Answering");
}

const stop = () => writing?.abort();

function clear() {
  stop();
  setWriting(null);
  for (const { asked, view } of exchanges.splice(0)) {
    asked.remove();
    view.element.remove();
  }
  $("empty").hidden = false;
  $("clear").disabled = true;
  announce("Cleared");
  question.focus();
}

// ---- showing --------------------------------------------------------------------------------------------------------

function answerView(exchange) {
  const text = h("div", { class: "text" });
  const facts = h("span", { class: "facts" });
  const copy = copyButton(() => exchange.answer);
  const again = h("button", { type: "button", class: "plain", onclick: regenerate }, "Regenerate");
  const foot = h("footer", { hidden: true }, facts, copy, again);
  // Busy: a screen reader waits for the whole answer.
  const element = h("article", { class: "answer", "aria-label": "Answer", "aria-busy": "true" }, text, foot);
  const markdown = new Markdown(text);
  let isDue = false;
  const draw = () => keepingTheEnd(() => markdown.update(exchange.answer));
  const drawDue = () => {
    isDue = false;
    if (element.ariaBusy === "true") draw();
  };
  function regenerate() {
    answer(exchange);
    $("stop").focus();
  }
  return {
    element,
    again,
    later() {
      if (!isDue) requestAnimationFrame(drawDue);
      isDue = true;
    },
    fail(message) {
      keepingTheEnd(() => foot.before(h("p", { class: "error", role: "alert" }, message)));
    },
    end(told) {
      draw();
      say(facts, factsOf(told));
      keepingTheEnd(() => {
        copy.hidden = exchange.answer === "";
        say(again, exchange.answer === "" ? "Try again" : "Regenerate");
        foot.hidden = false;
        element.ariaBusy = "false";
      });
    },
  };
}

function factsOf({ asked, first, last, numChunks, usage, reason }) {
  const said = [];
  if (first !== undefined) {
    const numTokens = usage?.completion_tokens ?? numChunks;
    said.push(`${usage ? "" : "about "}${numTokens} ${numTokens === 1 ? "token" : "tokens"}`);
    if (numTokens > 1 && last > first) said.push(`${(((numTokens - 1) * 1000) / (last - first)).toFixed(1)} tokens/s`);
    said.push(`first after ${((first - asked) / 1000).toFixed(2)} s`);
  }
  if (reason === "length") said.push("cut off by the limit of tokens");
  if (reason === "stopped") said.push("stopped");
  return said.join(" · ");
}

const isAtEnd = () => messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;

/** Follows the text as it grows, for a reader who is at its end and for no other. */
function keepingTheEnd(change) {
  const follow = isAtEnd();
  change();
  if (follow) messages.scrollTop = messages.scrollHeight;
  $("to-end").hidden = isAtEnd();
}

function announce(text) {
  say($("status"), text);
}

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

// ---- the key, settings ----------------------------------------------------------------------------------------------

/** What `work` gives; a server that wants a key gets what the user enters, for as long as one is entered. */
async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (error.status !== 401 || !(await askForKey(error.message))) throw error;
    }
  }
}

let askedForKey = null; // one dialog for all who wait

function askForKey(message) {
  askedForKey ??= new Promise((resolve) => {
    const before = apiKey();
    openSettings(form.elements.key, message);
    settings.addEventListener("close", () => resolve(settings.returnValue === "done" && apiKey() !== before), { once: true });
  }).finally(() => (askedForKey = null));
  return askedForKey;
}

function openSettings(focus, reason = "") {
  say($("key-asked"), reason);
  $("key-asked").hidden = reason === "";
  form.elements.key.value = apiKey();
  settings.returnValue = "";
  if (!settings.open) settings.showModal();
  focus.focus();
}

async function greet() {
  try {
    const { data } = await (await withKey(() => request("v1/models"))).json();
    modelName = data[0]?.id;
    say($("model"), modelName ?? "");
  } catch (error) {
    say($("greeting"), error.message);
  }
}

// ---- listening ------------------------------------------------------------------------------------------------------

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("input", fitQuestion);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settings.open) stop();
});
messages.addEventListener("scroll", () => ($("to-end").hidden = isAtEnd()), { passive: true });
$("to-end").addEventListener("click", () => {
  messages.scrollTop = messages.scrollHeight;
  messages.focus();
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", clear);
$("open-settings").addEventListener("click", () => openSettings(form.elements.system));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(form.elements.key.value);
  settings.close("done");
});

if (hasKeyboard) question.focus();
greet();
