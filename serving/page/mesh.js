/** The live view of the mesh: replicas, in each its pipeline stages, in each its tensor shards. */
import { keyChanges, request } from "./api.js";
import { h, say } from "./dom.js";

const EVERY_MS = 1000;
const AFTER_FAILURE_MS = 5000;
const NUM_SAMPLES = 60;
const LEAST_CARD_PX = 116;

const $ = (id) => document.getElementById(id);
const panel = $("mesh");
const rates = []; // tokens/s, the latest last

// ---- asking ---------------------------------------------------------------------------------------------------------

let timer;

async function poll() {
  clearTimeout(timer);
  if (document.visibilityState !== "visible") return; // goes on when it is
  let wait = EVERY_MS;
  try {
    show(await (await request("mesh")).json());
    tell("");
  } catch (error) {
    tell(error.status === 404 ? "This server does not tell of its mesh." : error.message);
    if (error.status === 401 || error.status === 404) return; // 401: until there is another key
    wait = AFTER_FAILURE_MS;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
}

function tell(problem) {
  say($("mesh-status"), problem);
  panel.classList.toggle("stale", problem !== "");
}

// ---- showing --------------------------------------------------------------------------------------------------------

let drawn; // the mesh as it stands there, and what brings it up to date
const totals = totalsView();

function show(state) {
  const replicas = replicasOf(state);
  const layout = JSON.stringify(replicas.map(({ index, stages }) => [index, stages.map((ranks) => ranks.map(({ rank }) => rank))]));
  if (drawn?.layout !== layout) {
    const views = replicas.map(replicaView);
    $("replicas").replaceChildren(...views.map((view) => view.element));
    $("replicas").classList.toggle("alone", replicas.length === 1);
    drawn = { layout, views };
    arrange();
  }
  const hosts = new Set((state.ranks ?? []).map(({ host }) => host));
  $("replicas").classList.toggle("one-host", hosts.size < 2);
  replicas.forEach((replica, i) => drawn.views[i].update(replica));
  totals.update(state, replicas);
}

/** Replicas with their ranks, as stages of shards; whatever the server leaves out is missing here, too. */
function replicasOf(state) {
  const ranks = (state.ranks ?? []).map((rank, i) => ({ rank: i, dp: 0, pp: 0, tp: 0, ...rank }));
  const told = (state.replicas ?? []).map((replica, i) => ({ ...replica, index: replica.replica ?? i }));
  return ascending([...told.map(({ index }) => index), ...ranks.map(({ dp }) => dp)]).map((index) => {
    const own = ranks.filter(({ dp }) => dp === index);
    const stages = ascending(own.map(({ pp }) => pp)).map((stage) =>
      own.filter(({ pp }) => pp === stage).sort((a, b) => a.tp - b.tp),
    );
    return { ...told.find((replica) => replica.index === index), index, stages };
  });
}

const ascending = (numbers) => [...new Set(numbers)].sort((a, b) => a - b);

function totalsView() {
  const [rate, running, waiting] = ["tokens/s", "running", "waiting"].map((name) => factView(name));
  const line = spark();
  $("totals").append(h("dl", {}, rate.element, running.element, waiting.element), line.element);
  return {
    update(state, replicas) {
      const now = sum(replicas, "tokens_per_s");
      rates.push(now ?? 0);
      if (rates.length > NUM_SAMPLES) rates.shift();
      rate.update(number(now));
      running.update(number(sum(replicas, "num_running")));
      waiting.update(number(sum(replicas, "num_waiting")));
      line.update();
      const { dp, pp, tp } = state.shape ?? {};
      say($("shape"), state.shape ? `dp ${number(dp)} · pp ${number(pp)} · tp ${number(tp)}` : "");
      say($("rate"), now === undefined ? "" : `${number(now)} tokens/s`);
    },
  };
}

function replicaView({ index, stages }) {
  const facts = ["tokens/s", "running", "waiting", "prefix hits", "preempted"].map((name) => factView(name));
  const blocks = barView("KV cache", "kv");
  const stageViews = stages.map(stageView);
  const element = h(
    "section",
    { class: "replica", "aria-label": `Replica ${index}` },
    h("h3", {}, `Replica ${index}`),
    h("dl", {}, ...facts.map((fact) => fact.element)),
    blocks.element,
    ...stageViews.map((view) => view.element),
  );
  return {
    element,
    update(replica) {
      const values = [replica.tokens_per_s, replica.num_running, replica.num_waiting].map(number);
      [...values, percent(replica.cached_tokens / replica.prompt_tokens), number(replica.num_preemptions)].forEach((text, i) => facts[i].update(text));
      const used = replica.num_blocks - replica.num_free_blocks;
      const share = used / replica.num_blocks;
      blocks.update(share, `${percent(share)} · ${number(used)} of ${number(replica.num_blocks)} blocks`);
      stageViews.forEach((view, i) => view.update(replica.stages[i], share));
    },
  };
}

function stageView(ranks) {
  const views = ranks.map(rankView);
  const title = h("h4");
  const cards = h("ul", { class: "ranks", "aria-label": `Ranks of stage ${ranks[0].pp}` }, ...views.map((view) => view.element));
  return {
    element: h("div", { class: "stage" }, title, cards),
    update(now, kvShare) {
      say(title, [`Stage ${now[0].pp}`, range("layer", now[0].layers)].filter(Boolean).join(" · "));
      now.forEach((rank, i) => views[i].update(rank, kvShare));
    },
  };
}

function rankView({ rank, dp, pp, tp }) {
  const [device, heads, weights] = Array.from({ length: 3 }, () => h("span"));
  const host = h("span", { class: "host" });
  const kv = barView("KV", "kv");
  const busy = barView("Busy", "busy");
  const place = h("span", { class: "place" }, `dp ${dp} · pp ${pp} · tp ${tp}`);
  return {
    element: h("li", { class: "rank" }, h("div", {}, h("h5", {}, `Rank ${rank}`), device), place, heads, weights, host, kv.element, busy.element),
    update(now, kvShare) {
      say(heads, [range("head", now.query_heads), range("KV", now.kv_heads, "KV")].filter(Boolean).join(" · "));
      say(weights, Number.isFinite(now.weight_bytes) ? `weights ${bytes(now.weight_bytes)}` : "");
      say(device, now.device ?? "");
      say(host, now.host ?? "");
      kv.update(now.kv_bytes > 0 ? kvShare : undefined, `${bytes(kvShare * now.kv_bytes)} of ${bytes(now.kv_bytes)}`);
      busy.update(now.busy_share, percent(now.busy_share));
    },
  };
}

/** A name and a value; in a <dl>. */
function factView(name) {
  const value = h("dd", {}, "–");
  return { element: h("div", {}, h("dt", {}, name), value), update: (text) => say(value, text) };
}

function barView(name, kind) {
  const fill = h("i");
  const meter = h("div", { class: `bar ${kind}`, role: "meter", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
  const value = h("span");
  const element = h("div", { class: "measure" }, h("span", {}, name), value, meter);
  return {
    element,
    update(share, text) {
      const isKnown = Number.isFinite(share);
      element.hidden = !isKnown;
      if (!isKnown) return;
      fill.style.setProperty("--share", Math.min(1, Math.max(0, share)));
      meter.ariaValueNow = Math.round(100 * share);
      meter.ariaValueText = text;
      say(value, text);
    },
  };
}

function spark() {
  const inSvg = (tag) => document.createElementNS("http://www.w3.org/2000/svg", tag);
  const [element, area, line] = [inSvg("svg"), inSvg("polygon"), inSvg("polyline")];
  element.setAttribute("viewBox", `0 0 ${NUM_SAMPLES - 1} 100`);
  element.setAttribute("preserveAspectRatio", "none");
  element.setAttribute("class", "spark");
  element.setAttribute("role", "img");
  element.append(area, line);
  return {
    element,
    update() {
      const most = Math.max(1, ...rates);
      const from = NUM_SAMPLES - rates.length;
      const points = rates.map((rate, i) => `${from + i},${(96 - (92 * rate) / most).toFixed(1)}`).join(" ");
      line.setAttribute("points", points);
      area.setAttribute("points", `${from},100 ${points} ${NUM_SAMPLES - 1},100`);
      element.setAttribute("aria-label", `Tokens/s of the last minute: now ${number(rates.at(-1))}, at most ${number(most)}`);
    },
  };
}

// ---- numbers --------------------------------------------------------------------------------------------------------

const [whole, tenths] = [0, 1].map((digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits }));
const number = (value) => (Number.isFinite(value) ? (Math.abs(value) < 100 ? tenths : whole).format(value) : "–");
const percent = (share) => (Number.isFinite(share) ? `${Math.round(100 * share)} %` : "–");

/** Of [first, stop]; "" if it is not known. */
function range(one, bounds, many = `${one}s`) {
  const [first, stop] = bounds ?? [];
  if (!Number.isFinite(stop)) return "";
  if (stop <= first) return `no ${many}`;
  return stop - first === 1 ? `${one} ${first}` : `${many} ${first}–${stop - 1}`;
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, value)) / 10));
  return `${number(value / 1024 ** power)} ${units[power]}`;
}

/** Over those that tell it; undefined if none does. */
function sum(replicas, name) {
  const told = replicas.map((replica) => replica[name]).filter(Number.isFinite);
  return told.length === 0 ? undefined : told.reduce((a, b) => a + b);
}

// ---- room -----------------------------------------------------------------------------------------------------------

/** As many columns as fit, in rows as even as can be: four cards in room for three are two and two. */
function arrange() {
  for (const cards of panel.querySelectorAll(".ranks")) {
    const room = Math.max(1, Math.floor(cards.clientWidth / LEAST_CARD_PX));
    const numRows = Math.ceil(cards.childElementCount / room);
    cards.style.setProperty("--columns", Math.ceil(cards.childElementCount / numRows));
  }
}

const isShown = () => getComputedStyle(panel).display !== "none";
const tellToggle = () => $("mesh-toggle").setAttribute("aria-expanded", isShown());

$("mesh-toggle").addEventListener("click", () => {
  document.body.dataset.mesh = isShown() ? "closed" : "open";
  tellToggle();
});
new ResizeObserver(() => (arrange(), tellToggle())).observe(panel);
document.addEventListener("visibilitychange", poll);
keyChanges.addEventListener("change", poll);
tellToggle();
poll();
