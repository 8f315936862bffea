"use strict";
// Replays Confidence(threshold) on the samples in the page, and draws. No request is made, nothing is stored.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
  const points = (share) => `${share < 0 ? "\u2212" : "+"}${Math.abs(100 * share).toFixed(2)}`;

  // --- the samples -------------------------------------------------------------------------------------------------
  function decode(text, Kind) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Kind(bytes.buffer);
  }

  function unpack(run) {
    const Classes = run.bytes_per_class === 1 ? Uint8Array : Uint16Array;
    return {
      ...run,
      confidences: decode(run.confidences, Float32Array),
      predictions: decode(run.predictions, Classes),
      labels: decode(run.labels, Classes),
    };
  }

  // As `replay` decides: leave at the first exit whose confidence reaches the threshold; the last one answers the rest.
  function replay(run, threshold) {
    const limit = Math.fround(threshold); // confidences are float32, and so PyTorch compares
    const { n, exits, confidences, predictions, labels } = run;
    const right = new Float64Array(run.num_exits), wrong = new Float64Array(run.num_exits);
    let sameAsLast = 0, rightAtEnd = 0, cost = 0;
    const last = exits.length - 1, end = exits[last];
    for (let i = 0; i < n; i++) {
      let place = 0;
      while (place < last && !(confidences[exits[place] * n + i] >= limit)) place++;
      let answerer = exits[place];
      if (run.answer === "most_confident" && place === last) {
        let best = 0;
        for (const exit of exits) {
          if (confidences[exit * n + i] > best) { best = confidences[exit * n + i]; answerer = exit; }
        }
      }
      const answer = predictions[answerer * n + i];
      (answer === labels[i] ? right : wrong)[exits[place]]++;
      if (answer === predictions[end * n + i]) sameAsLast++;
      if (predictions[end * n + i] === labels[i]) rightAtEnd++;
    }
    let correct = 0;
    exits.forEach((exit, place) => { cost += (right[exit] + wrong[exit]) * run.costs[place]; correct += right[exit]; });
    const share = (counts) => Array.from(counts, (count) => count / n);
    return {
      accuracy: correct / n, difference: (correct - rightAtEnd) / n, agreement: sameAsLast / n, cost: cost / n, right: share(right), wrong: share(wrong),
      shares: Array.from(right, (count, exit) => (count + wrong[exit]) / n),
    };
  }

  // --- drawing -----------------------------------------------------------------------------------------------------
  function colours() {
    const style = getComputedStyle(document.documentElement);
    const resolve = (value) => {
      if (typeof value === "string" && value.startsWith("--")) return style.getPropertyValue(value).trim();
      if (Array.isArray(value)) return value.map(resolve);
      if (value && typeof value === "object") {
        return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolve(inner)]));
      }
      return value;
    };
    return resolve;
  }

  function layoutOf(element, own, resolve) {
    const narrow = element.clientWidth < 520;
    const axis = (given) => ({
      gridcolor: "--grid", zeroline: false, linecolor: "--line", automargin: true, fixedrange: narrow, ...given,
      title: given && given.title ? { ...given.title, standoff: 8, font: { size: 13 } } : undefined,
    });
    return resolve({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif", size: 13, color: "--ink" },
      margin: { l: 48, r: 12, t: 8, b: 44 },
      hoverlabel: { bgcolor: "--panel", bordercolor: "--line", font: { color: "--ink" } },
      dragmode: narrow ? false : "zoom",
      ...own,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow ? 11 : 12 }, ...own.legend },
      width: element.clientWidth, height: Number(element.dataset.height) + (narrow ? Number(element.dataset.legend || 0) : 0),
      xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
    });
  }

  function draw(element) {
    const plot = page.plots[element.dataset.plot], resolve = colours();
    // A flow diagram that is drawn again moves there slowly; paper does not wait for that.
    if (plot.data[0].type === "sankey") Plotly.purge(element);
    Plotly.react(element, resolve(plot.data), layoutOf(element, plot.layout, resolve), { displayModeBar: false });
  }

  const drawShown = () => all(".plot").filter((element) => element.offsetParent !== null).forEach(draw);

  // --- the threshold -----------------------------------------------------------------------------------------------
  function show(chapter, run, threshold) {
    const found = replay(run, threshold), key = chapter.dataset.run;
    const values = {
      accuracy: [found.accuracy, 2], difference: [found.difference, 2], agreement: [found.agreement, 2], cost: [found.cost, 1], saved: [1 - found.cost, 1],
      early: [1 - found.shares[run.num_exits - 1], 1],
    };
    all("[data-live]", chapter).forEach((element) => {
      const [value, digits] = values[element.dataset.live];
      element.dataset.value = value;
      element.textContent = element.dataset.live === "difference" ? points(value) : percent(value, digits);
    });
    all("[data-bar]", chapter).forEach((bar) => {
      bar.setAttribute("width", `${(60 * found.shares[bar.dataset.bar]).toFixed(2)}%`);
    });
    all("[data-share]", chapter).forEach((text) => {
      const share = found.shares[text.dataset.share];
      text.dataset.value = share;
      text.setAttribute("x", `${(60 * share).toFixed(2)}%`);
      text.textContent = percent(share);
    });
    const curve = page.plots[`${key}-curve`].data.at(-1), leaving = page.plots[`${key}-leaving`].data;
    curve.x = [100 * found.cost];
    curve.y = [100 * found.accuracy];
    curve.name = curve.text[0] = threshold > 1 ? "nobody leaves early" : `the slider: threshold ${threshold.toFixed(3)}`;
    leaving[0].y = found.right.map((share) => 100 * share);
    leaving[1].y = found.wrong.map((share) => 100 * share);
    all(`[data-plot="${key}-curve"], [data-plot="${key}-leaving"]`, chapter)
      .filter((element) => element.offsetParent !== null).forEach(draw);
  }

  function connect(chapter) {
    const run = unpack(page.runs[chapter.dataset.run]);
    const range = chapter.querySelector('input[type="range"]'), number = chapter.querySelector('input[type="number"]');
    const words = chapter.querySelector("[data-words]"), source = words.textContent;
    let frame = 0;
    const set = (threshold, from) => {
      if (from !== range) range.value = threshold;
      if (from !== number) number.value = Number(threshold.toFixed(6));
      range.setAttribute("aria-valuetext", threshold > 1 ? "nobody leaves early" : `confidence ${threshold.toFixed(3)}`);
      words.textContent = threshold === run.threshold
        ? source
        : "Tried by hand on the test samples: good for looking, not a fair figure to report.";
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => show(chapter, run, threshold));
    };
    range.addEventListener("input", () => set(Number(range.value), range));
    number.addEventListener("input", () => {
      const threshold = Number(number.value);
      if (number.value !== "" && threshold >= 0 && threshold <= 2) set(threshold, number);
    });
    chapter.querySelector("[data-reset]").addEventListener("click", () => set(run.threshold, null));
    set(run.threshold, null);
  }

  // --- runs, themes, paper -----------------------------------------------------------------------------------------
  const chapters = all("[data-run]"), connected = new Set();
  function choose(key) {
    chapters.forEach((chapter) => { chapter.hidden = chapter.dataset.run !== key; });
    all("[data-choose]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.choose === key)));
    drawShown();
    const chapter = chapters.find((one) => one.dataset.run === key);
    if (key in page.runs && !connected.has(key)) {
      connected.add(key);
      connect(chapter);
    }
  }
  all("[data-choose]").forEach((button) => button.addEventListener("click", () => choose(button.dataset.choose)));

  let width = window.innerWidth, waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar comes and goes
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawShown, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawShown);
  window.addEventListener("beforeprint", () => { document.documentElement.dataset.printing = ""; drawShown(); });
  window.addEventListener("afterprint", () => { delete document.documentElement.dataset.printing; drawShown(); });

  all(".gallery figure").forEach((figure) => {
    const place = () => {
      const answers = figure.querySelector(".answers");
      answers.style.setProperty("--shift", "0px");
      const box = answers.getBoundingClientRect(), room = document.documentElement.clientWidth - 6;
      const shift = box.left < 6 ? 6 - box.left : box.right > room ? room - box.right : 0;
      answers.style.setProperty("--shift", `${shift}px`);
    };
    figure.addEventListener("mouseenter", place);
    figure.addEventListener("focus", place);
  });

  document.querySelector("[data-words-to-know]").open = window.innerWidth > 700; // on a phone they fill the first screen
  choose(page.first);
})();
