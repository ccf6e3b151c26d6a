// Plays the user in the page that `visualize.py movie --out x.html` wrote; test_visualize.py puts it there.
// What it saw goes into the page, as JSON, for Chromium's --dump-dom.
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const at = id => document.getElementById(id);
const captions = () => [...document.querySelectorAll("figcaption")].map(caption => caption.textContent);
const pixels = (id = "axial") => {
  const canvas = at(id).querySelector("canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return Array.from({length: data.length / 4}, (_, i) => data.slice(4 * i, 4 * i + 3).join());
};
const count = colour => pixels().filter(pixel => pixel === colour).length;
const slide = (slider, value) => { slider.value = value; slider.dispatchEvent(new Event("input")) };
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const SKY = "86,180,233", YELLOW = "240,228,66", VERMILION = "213,94,0", PURPLE = "204,121,167", BLACK = "0,0,0";

(async () => {
  const seen = {};
  while (!document.body.dataset.ready) await wait(50);
  const first = pixels();
  seen.start = captions();
  seen.sizes = [...document.querySelectorAll("canvas")].map(canvas => [canvas.width, canvas.height]);
  seen.colours = [SKY, YELLOW, VERMILION, PURPLE].map(count);

  slide(at("axial").querySelector("input"), 0);
  seen.slider = [captions()[0], pixels().some((pixel, i) => pixel !== first[i]), count(SKY)];
  slide(at("axial").querySelector("input"), 4);
  seen.back = pixels().every((pixel, i) => pixel === first[i]);

  const rims = count(SKY);
  slide(at("opacity"), 0);
  seen.opacity = [count(SKY) === rims, pixels().some((pixel, i) => pixel !== first[i])];
  slide(at("opacity"), 45);

  at("prediction").click();
  seen.prediction = count(SKY);
  at("missed").click();
  at("false").click();
  seen.errors = [count(YELLOW), count(VERMILION)];
  at("truth").click();
  seen.truth = count(PURPLE);
  at("truth").click();
  at("scan").click();
  seen.scan = new Set(pixels()).size;  // black, and the white ticks
  for (const id of ["scan", "prediction", "missed", "false"]) at(id).click();
  seen.on_again = pixels().every((pixel, i) => pixel === first[i]);
  press("1");
  seen.key_1 = at("scan").checked;
  press("1");

  press("ArrowRight");
  seen.right = captions()[0];
  press("ArrowLeft");
  press("ArrowLeft");
  seen.left = captions()[0];
  slide(at("coronal").querySelector("input"), 3);
  press("ArrowRight");
  seen.coronal = captions();

  press(" ");
  await wait(1000);
  press(" ");
  const stopped = captions()[1];
  await wait(300);
  seen.play = [stopped !== seen.coronal[1], captions()[1] === stopped];

  const canvas = at("axial").querySelector("canvas"), box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + 1, clientY: box.bottom - 2, bubbles: true}));
  seen.click = captions();
  seen.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.errors_told = window.told;
  element(document.body, "pre", {id: "seen", textContent: JSON.stringify(seen)});
})();
