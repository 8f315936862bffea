"use strict";
// Draws what the network says as it arrives, and decides as Confidence(threshold) does. Asks this server alone.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const one = (id) => document.getElementById(id);
  const percent = (share, digits = 1) => {
    const text = (100 * share).toFixed(digits);
    return `${Number(text) === 0 ? text.replace("-", "") : text}\u00a0%`; // no minus zero
  };
  const last = page.exits.length - 1, several = last > 0, PER_PAGE = 24;
  const lines = [...document.querySelectorAll(".exit")];
  const part = (exit, name) => lines[exit].querySelector(`[data-part="${name}"]`);

  // What is known of the image on show; exits without an answer yet are undefined.
  let now = empty(), complete = null; // the second: when all of it is there
  let threshold = page.threshold, asking = null, playing = 0;

  function empty() {
    return { label: null, answers: [], looks: [], own: null, confused: null, done: false };
  }

  // --- the decision ------------------------------------------------------------------------------------------------
  // As Confidence decides: leave at the first exit whose confidence reaches the threshold; the last one answers the
  // rest, or the most confident one that was met.
  function decide() {
    const limit = Math.fround(threshold); // confidences are float32, and so PyTorch compares
    let best = null;
    for (let place = 0; place < page.used.length; place++) {
      const exit = page.used[place], said = now.answers[exit];
      if (said === undefined) return null;
      if (best === null || said.scores[0] > best.scores[0]) best = said;
      if (exit === last || said.scores[0] >= limit) {
        const by = exit === last && page.answer === "most_confident" ? best : said;
        return { exit, cost: page.costs[place], label: by.classes[0], by: by.exit };
      }
    }
    return null;
  }

  const isRight = (label) => (now.label === null ? "unknown" : label === now.label ? "yes" : "no");

  function showDecision() {
    const found = several ? decide() : null;
    lines.forEach((line, exit) => {
      const marks = line.querySelector(".marks");
      marks.replaceChildren();
      line.classList.toggle("leaves", found !== null && found.exit === exit);
      line.classList.toggle("beyond", found !== null && exit > found.exit);
      const mark = (text, kind) => {
        const element = document.createElement("span");
        element.className = `mark ${kind}`;
        element.textContent = text;
        marks.append(element, " ");
      };
      if (found !== null && found.exit === exit) mark("leaves here", "leaves");
      if (found !== null && found.by === exit && found.by !== found.exit) mark("the most confident: its answer counts", "");
      if (found !== null && exit > found.exit) mark("would not be computed", "");
      if (now.own !== null && now.own.exit === exit) mark(`the run's own policy (${page.policy}) leaves here`, "");
    });
    document.querySelectorAll(".tick").forEach((tick) => { tick.style.left = `${100 * Math.min(threshold, 1)}%`; });
    if (!several) return;
    const live = (name, text, value) => {
      const element = document.querySelector(`[data-live="${name}"]`);
      if (element.textContent !== text) element.textContent = text;
      element.dataset.value = value;
    };
    live("exit", found ? page.exits[found.exit].name : "–", found ? found.exit : "");
    live("answer", found ? page.classes[found.label] : "–", found ? found.label : "");
    live("cost", found ? percent(found.cost) : "–", found ? found.cost : "");
    live("saved", found ? percent(1 - found.cost) : "–", found ? 1 - found.cost : "");
    drawCourse(found);
  }

  // --- one exit ----------------------------------------------------------------------------------------------------
  function showExit(exit) {
    const line = lines[exit], said = now.answers[exit];
    const fill = line.querySelector(".fill"), image = line.querySelector("img");
    if (said === undefined) {
      for (const name of ["right", "answer", "confidence"]) delete line.dataset[name];
      part(exit, "answer").textContent = "–";
      for (const name of ["confidence", "others", "facts"]) part(exit, name).textContent = "";
      fill.style.width = "0";
    } else {
      const label = said.classes[0], right = isRight(label);
      line.dataset.right = right;
      line.dataset.answer = label;
      line.dataset.confidence = said.scores[0];
      part(exit, "answer").textContent = `${{ yes: "✓ ", no: "✗ ", unknown: "" }[right]}${page.classes[label]}`;
      part(exit, "confidence").textContent = percent(said.scores[0]);
      fill.style.width = `${100 * said.scores[0]}%`;
      part(exit, "others").textContent = said.classes.slice(1, 5)
        .map((other, place) => `${page.classes[other]} ${percent(said.scores[place + 1])}`).join(" · ");
      const facts = [`after ${said.elapsed_ms.toFixed(1)} ms`];
      if (now.confused && exit < last) facts.push(`${now.confused.distances[exit].toFixed(2)} away from the last exit`);
      const look = now.looks[exit];
      if (look && look.image === null) facts.push(`no map of where it looked: ${look.why_not}`);
      part(exit, "facts").textContent = facts.join(" · ");
    }
    const look = now.looks[exit];
    image.hidden = !(look && look.image);
    if (look && look.image) {
      image.src = look.image;
      image.alt = `Where ${page.exits[exit].name} looked for ${page.classes[said.classes[0]]}`;
    } else {
      image.removeAttribute("src");
    }
  }

  // --- drawing -----------------------------------------------------------------------------------------------------
  function svg(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // The classes that an exit answered, in the order in which they came up, and the true one.
  function classesShown() {
    const found = [];
    now.answers.forEach((said) => { if (!found.includes(said.classes[0])) found.push(said.classes[0]); });
    if (now.label !== null && now.answers.length && !found.includes(now.label)) found.push(now.label);
    return found.slice(0, 6);
  }

  function drawCourse(found) {
    const home = one("course"), width = Math.max(240, home.clientWidth), height = 190;
    const left = 46, right = 10, top = 8, bottom = 24;
    const x = (depth) => left + depth * (width - left - right), y = (p) => top + (1 - p) * (height - top - bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height });
    for (const p of [0, 0.5, 1]) {
      root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(p), y2: y(p) }));
      root.append(svg("text", { x: left - 6, y: y(p) + 4, "text-anchor": "end" }, percent(p, 0)));
    }
    let free = -Infinity;
    page.exits.forEach((exit, number) => {
      const middle = x(exit.depth), name = number === last ? "last" : String(number);
      root.append(svg("line", { class: "grid", x1: middle, x2: middle, y1: top, y2: height - bottom }));
      if (middle < free) return;
      root.append(svg("text", { x: middle, y: height - 7, "text-anchor": number === last ? "end" : "middle" }, name));
      free = middle + 24;
    });
    if (threshold <= 1) {
      root.append(svg("line", { class: "limit", x1: left, x2: width - right, y1: y(threshold), y2: y(threshold) }));
    }
    if (found) {
      const depth = x(page.exits[found.exit].depth);
      root.append(svg("line", { class: "here", x1: depth, x2: depth, y1: top, y2: height - bottom }));
    }
    const shown = classesShown(), legend = one("legend");
    shown.forEach((label, number) => {
      const points = now.answers.map((said, exit) => {
        const place = said.classes.indexOf(label);
        return [x(page.exits[exit].depth), y(place < 0 ? 0 : said.scores[place])];
      });
      root.append(svg("polyline", { class: `line c${number}`, points: points.map((point) => point.join(",")).join(" ") }));
      points.forEach(([cx, cy]) => root.append(svg("circle", { class: `dot c${number}`, cx, cy, r: 3.5 })));
    });
    home.replaceChildren(root);
    legend.replaceChildren(...shown.map((label, number) => {
      const entry = document.createElement("span"), swatch = document.createElement("span");
      swatch.className = `swatch c${number}`;
      entry.append(swatch, `${page.classes[label]}${label === now.label ? " (true)" : ""}`);
      return entry;
    }));
  }

  function drawHistogram() {
    const home = one("histogram"), { edges, right, wrong } = page.histogram, here = now.confused.normalised;
    const width = Math.max(240, home.clientWidth), height = 120, bottom = 22;
    const low = Math.min(edges[0], here), high = Math.max(edges.at(-1), here), most = Math.max(...right, ...wrong);
    const x = (value) => 6 + ((value - low) / (high - low)) * (width - 12), y = (share) => (height - bottom) * (1 - share / most);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height });
    for (const [name, shares] of [["right", right], ["wrong", wrong]]) {
      shares.forEach((share, bin) => root.append(svg("rect", {
        class: name, x: x(edges[bin]), width: Math.max(0, x(edges[bin + 1]) - x(edges[bin]) - 0.5),
        y: y(share), height: height - bottom - y(share),
      })));
    }
    root.append(svg("line", { class: "here", x1: x(here), x2: x(here), y1: 0, y2: height - bottom }));
    for (const [value, anchor] of [[low, "start"], [0, "middle"], [high, "end"]]) {
      if (value === 0 && (x(0) < 40 || x(0) > width - 40)) continue;
      root.append(svg("text", { x: x(value), y: height - 6, "text-anchor": anchor }, value.toFixed(value === 0 ? 0 : 1)));
    }
    home.replaceChildren(root);
  }

  function showConfusion() {
    const section = one("confusion");
    if (!section) return;
    section.hidden = now.confused === null;
    if (now.confused === null) return;
    const { confusion, normalised, right_above: right, wrong_above: wrong } = now.confused;
    const words = [`The exits disagree with the last one by ${confusion.toFixed(2)} in all (at most ${(2 * last).toFixed(0)}).`];
    if (normalised !== null) {
      const size = `${Math.abs(normalised).toFixed(2)} spreads ${normalised < 0 ? "below" : "above"}`;
      words.push(`That is ${size} what is usual on training images.`);
    }
    if (right !== null) {
      words.push(`Of the test images, ${percent(right)} of the right answers and ${percent(wrong)} of the wrong ones are more confused.`);
    }
    one("confused").textContent = words.join(" ");
    section.dataset.confusion = confusion;
    section.dataset.normalised = normalised === null ? "" : normalised;
    one("spread").hidden = page.histogram === null || normalised === null;
    if (!one("spread").hidden) drawHistogram();
  }

  function showAll() {
    lines.forEach((line, exit) => showExit(exit));
    showDecision();
    showConfusion();
    one("looks").hidden = !now.looks.some((look) => look && look.image);
    const again = one("again");
    if (again) again.hidden = complete === null;
  }

  // --- asking ------------------------------------------------------------------------------------------------------
  function say(text) { one("status").textContent = text; }

  function complain(text) {
    const error = one("error");
    error.hidden = text === "";
    error.textContent = text;
    if (text !== "") error.scrollIntoView({ block: "nearest" });
  }

  function take(event) {
    if (event.event === "begun") {
      now.label = event.label;
      const image = one("image");
      image.hidden = false;
      image.src = event.image;
      image.alt = event.label === null ? "Your image" : `A ${page.classes[event.label]}`;
      const truth = event.label === null ? "" : `: ${page.classes[event.label]}`;
      one("caption").textContent = `${event.words[0].toUpperCase()}${event.words.slice(1)}${truth}`;
    } else if (event.event === "answered") {
      now.answers[event.exit] = event;
      say(`${now.answers.length} of ${page.exits.length} exits have answered.`);
    } else if (event.event === "decided") {
      now.own = event;
    } else if (event.event === "confused") {
      now.confused = event;
    } else if (event.event === "looked") {
      now.looks[event.exit] = event;
      say(`Looking where the exits looked: ${event.exit + 1} of ${page.exits.length}.`);
    } else if (event.event === "failed") {
      throw new Error(event.error);
    } else if (event.event === "done") {
      now.done = true;
      complete = now;
      const said = now.answers[last], name = page.classes[said.classes[0]];
      say(`The last exit answers ${name}, after ${said.elapsed_ms.toFixed(1)} ms.`);
    }
    showAll();
  }

  // The server's own sentence; where there are too many visitors, it has none.
  const reason = (response) => response.json().then(({ error }) => error, () => "The server is busy. Try again in a moment.");

  async function read(response, signal) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read().catch(() => ({ done: true })); // the connection broke
      if (signal.aborted) return; // another image was chosen meanwhile
      if (done) break;
      const whole = (rest + value).split("\n");
      rest = whole.pop();
      for (const line of whole) take(JSON.parse(line));
    }
    if (!now.done) throw new Error("The server stopped before the end. Look at the terminal that it runs in.");
  }

  // Where page and choice stand one above the other, what was asked for would be off the screen.
  function bringIntoView() {
    if (matchMedia("(min-width: 1000px)").matches) return;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    one("result").scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  }

  async function ask(address, body) {
    if (asking) asking.abort();
    clearTimeout(playing);
    const mine = asking = new AbortController();
    complain("");
    now = empty();
    complete = null;
    one("image").hidden = true;
    one("caption").textContent = "The image will be shown as the network sees it.";
    showAll();
    say("Asking the network …");
    bringIntoView();
    try {
      let response;
      try {
        response = await fetch(address, { method: "POST", body, signal: mine.signal });
      } catch (error) {
        if (mine.signal.aborted) throw error;
        throw new Error("The server does not answer, or the file cannot be read. Is shallowdeep explore still running?");
      }
      if (!response.ok) throw new Error(await reason(response));
      await read(response, mine.signal);
    } catch (error) {
      if (mine.signal.aborted) return;
      complain(error.message);
      say("No prediction.");
    } finally {
      if (asking === mine) asking = null;
    }
  }

  function send(file) {
    document.querySelectorAll('.shelf [aria-pressed="true"]').forEach((button) => button.setAttribute("aria-pressed", "false"));
    if (file.size > page.most_bytes) {
      complain(page.too_large); // what the server would say, which checks again
      return;
    }
    ask("/evolve", file);
  }

  // What has arrived once more, an exit at a time: nothing is computed.
  function playAgain() {
    const before = complete;
    clearTimeout(playing);
    now = { ...empty(), label: before.label };
    let exit = 0;
    const next = () => {
      if (exit <= last) {
        now.answers[exit] = before.answers[exit];
        now.looks[exit] = before.looks[exit];
        exit++;
        playing = setTimeout(next, 700);
      } else {
        now = before;
      }
      showAll();
    };
    next();
  }

  // --- test images -------------------------------------------------------------------------------------------------
  let start = 0, asked = 0;
  async function browse(from) {
    const group = one("group").value, mine = ++asked;
    const response = await fetch(`/samples?${new URLSearchParams({ group, start: from, count: PER_PAGE })}`).catch(() => null);
    if (response === null || !response.ok) {
      complain(response === null ? "The server does not answer. Is shallowdeep explore still running?" : await reason(response));
      return;
    }
    const { total, samples } = await response.json();
    if (mine !== asked) return; // another page was asked for meanwhile
    start = from;
    one("shelf").replaceChildren(...samples.map(({ id, label, image }) => {
      const item = document.createElement("li"), button = document.createElement("button"), picture = document.createElement("img");
      button.type = "button";
      button.dataset.sample = id;
      button.setAttribute("aria-pressed", "false");
      picture.src = image;
      picture.alt = `Test image ${id}:`;
      button.append(picture, label);
      button.addEventListener("click", () => {
        document.querySelectorAll(".shelf button").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        ask(`/evolve?sample=${id}`);
      });
      item.append(button);
      return item;
    }));
    one("where").textContent = `${start + 1}–${start + samples.length} of ${total.toLocaleString("en")}`;
    one("before").disabled = start === 0;
    one("after").disabled = start + PER_PAGE >= total;
  }

  // --- hands -------------------------------------------------------------------------------------------------------
  if (one("group")) {
    one("group").addEventListener("change", () => browse(0));
    one("before").addEventListener("click", () => browse(Math.max(0, start - PER_PAGE)));
    one("after").addEventListener("click", () => browse(start + PER_PAGE));
    browse(0);
  }

  one("file").addEventListener("change", () => {
    const [file] = one("file").files;
    if (file) send(file);
    one("file").value = ""; // the same file may be chosen again
  });
  const drop = one("drop");
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // a file dropped beside the place is not opened instead of the page
      drop.classList.toggle("over", kind === "dragover" || kind === "dragenter");
    });
  }
  document.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) send(file);
    else complain("That was no file. Drop an image file, or choose one.");
  });

  if (several) {
    const range = one("threshold"), exactly = one("exactly"), source = one("source");
    const set = (value, from) => {
      threshold = value;
      if (from !== range) range.value = value;
      if (from !== exactly) exactly.value = Number(value.toFixed(6));
      range.setAttribute("aria-valuetext", value > 1 ? "nobody leaves early" : `confidence ${value.toFixed(3)}`);
      source.textContent = value === page.threshold ? source.dataset.source : "Tried by hand: good for looking.";
      showDecision();
    };
    range.addEventListener("input", () => set(Number(range.value), range));
    exactly.addEventListener("input", () => {
      const value = Number(exactly.value);
      if (exactly.value !== "" && value >= 0 && value <= 2) set(value, exactly);
    });
    one("back").addEventListener("click", () => set(page.threshold, null));
    one("again").addEventListener("click", playAgain);
    set(page.threshold, null);
    let waiting = 0;
    window.addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { showDecision(); showConfusion(); }, 150);
    });
  }
})();
