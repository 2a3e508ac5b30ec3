// textual.js starts on load and measures characters at once: let it wait for its font.
const start = window.onload;
window.onload = async (event) => {
  try {
    await Promise.all(["400", "700"].map((weight) => document.fonts.load(`${weight} 16px "Roboto Mono"`)));
  } finally {
    start(event);
    document.querySelector(".xterm-helper-textarea")?.focus();
    document.querySelector("#again").addEventListener("click", () => window.location.reload());
  }
};
