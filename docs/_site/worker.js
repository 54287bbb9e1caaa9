// A page that is opened from the disk may start no worker, which the search is. There this frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inner = this.frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source !== inner) return;
        const told = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(told);
        if (this.onmessage) this.onmessage(told);
      });
      this.ready = new Promise((resolve) => (window.__worker = resolve));
      inner.document.open();
      inner.document.write(`<body><script>
        const load = (url) => new Promise((resolve, reject) => {
          const script = document.createElement("script");
          Object.assign(script, { src: url, onload: resolve, onerror: reject });
          document.body.appendChild(script);
        });
        window.postMessage = (data) => parent.postMessage(data, "*");
        window.importScripts = (...urls) => urls.reduce((done, url) => done.then(() => load(url)), Promise.resolve());
        load(${JSON.stringify(String(url))}).then(() => parent.__worker());
      <\/script></body>`);
      inner.document.close();
    }
    postMessage(data) {
      const inner = this.frame.contentWindow;
      this.ready.then(() => inner.dispatchEvent(new inner.MessageEvent("message", { data, source: window })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
